//! The serial console by hand: ringvm in a tmux pane of L1, keys typed and the screen looked at.

use std::thread::sleep;
use std::time::{Duration, Instant};

use ringvm_tests::lab::{Lab, Vm, disk, lab, vm};
use ringvm_tests::{Error, Result};

/// A terminal of L1 with a shell in it.
struct Terminal<'a> {
    lab: &'a Lab,
}

impl<'a> Terminal<'a> {
    fn open(lab: &'a Lab) -> Result<Terminal<'a>> {
        lab.run("tmux -f /dev/null -L hand new-session -d -x 100 -y 40 -s hand 'PS1=\"L1# \" sh -i'")?;
        let terminal = Terminal { lab };
        terminal.prompts("L1#", 20)?;
        Ok(terminal)
    }

    /// Types text as it is.
    fn types(&self, text: &str) -> Result<()> {
        let quoted = text.replace('\'', r"'\''");
        self.lab.run(&format!("tmux -L hand send-keys -t hand -l '{quoted}'")).map(drop)
    }

    /// Presses a key by tmux's name for it.
    fn presses(&self, key: &str) -> Result<()> {
        self.lab.run(&format!("tmux -L hand send-keys -t hand {key}")).map(drop)
    }

    fn enters(&self, line: &str) -> Result<()> {
        self.types(line)?;
        self.presses("Enter")
    }

    fn screen(&self) -> Result<String> {
        // All that was shown since the last `clear`, lines that scrolled out included.
        self.lab.run("tmux -L hand capture-pane -p -S - -t hand")
    }

    /// Waits until the screen shows this.
    fn shows(&self, text: &str, seconds: u64) -> Result<String> {
        self.screen_where(&format!("`{text}`"), seconds, |screen| screen.contains(text))
    }

    fn screen_where(&self, what: &str, seconds: u64, holds: impl Fn(&str) -> bool) -> Result<String> {
        let limit = Duration::from_secs(seconds);
        let deadline = Instant::now() + limit;
        loop {
            let screen = self.screen()?;
            if holds(&screen) {
                return Ok(screen);
            }
            if Instant::now() > deadline {
                return Err(Error::TimedOut { what: format!("{what} on the screen"), limit, tail: screen });
            }
            sleep(Duration::from_millis(200));
        }
    }

    /// Waits until the screen ends with a prompt, which may follow the guest's own: it leaves its line open when it is ended.
    fn prompts(&self, prompt: &str, seconds: u64) -> Result<()> {
        self.screen_where(&format!("the prompt `{prompt}`"), seconds, |screen| {
            screen.trim_end().lines().next_back().is_some_and(|line| line.trim_end().ends_with(prompt))
        })
        .map(drop)
    }

    fn clear(&self) -> Result<()> {
        self.lab.run("tmux -L hand send-keys -R -t hand && tmux -L hand clear-history -t hand").map(drop)
    }

    /// The terminal as a shell needs it: a line is edited and echoed, Ctrl-C interrupts.
    fn is_usable(&self) -> Result<()> {
        self.clear()?;
        self.presses("Enter")?;
        self.enters(
            "stty -a | tr ' ' '\\n' | grep -xE -e '-?(icanon|echo|isig|icrnl|opost)' | sort | xargs echo mode:",
        )?;
        let screen = self.shows("mode: ", 20)?;
        assert!(screen.contains("mode: echo icanon icrnl isig opost"), "{screen}");
        Ok(())
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        let _ = self.lab.run("tmux -L hand kill-server");
    }
}

fn command(machine: &Vm) -> String {
    let quoted = machine.args().into_iter().map(|a| format!("'{a}'"));
    format!("ringvm {}", quoted.collect::<Vec<_>>().join(" "))
}

#[test]
fn a_person_works_on_the_serial_console_in_tmux() {
    lab(|lab| {
        let image = lab.image("64M")?;
        let machine = vm().cpus(2).disk(disk(&image).serial("by-hand")).by_hand();
        let terminal = Terminal::open(lab)?;
        terminal.enters(&command(&machine))?;
        terminal.prompts("guest#", 180)?;

        // Typed with a mistake that is mended, as people do.
        terminal.types("lsblk -no NAME,SERIALX")?;
        terminal.presses("BSpace")?;
        terminal.presses("Enter")?;
        terminal.shows("by-hand", 20)?;
        // Ctrl-C belongs to the guest: it interrupts what runs there, and ringvm goes on.
        terminal.enters("sleep 1000")?;
        sleep(Duration::from_secs(2));
        terminal.presses("C-c")?;
        terminal.enters("echo $((6 * 7)) interrupted")?;
        terminal.shows("42 interrupted", 20)?;
        // More at once than any FIFO holds arrives whole and in order, typed and printed.
        let long: String = (0..60).map(|n| format!("{n:03}")).collect();
        terminal.enters(&format!("echo {long} | md5sum"))?;
        let expected = lab.run(&format!("echo {long} | md5sum"))?;
        terminal.shows(&expected, 30)?;
        terminal.enters("seq 1 500 | tail -n 501; echo printed-$((1 + 1))")?;
        let screen = terminal.shows("printed-2", 60)?;
        let mut counted = screen.lines().filter_map(|line| line.trim().parse::<u32>().ok()).filter(|n| *n > 3);
        for number in 4..=500 {
            assert_eq!(counted.next(), Some(number), "{screen}");
        }

        terminal.enters("poweroff -f")?;
        terminal.prompts("L1#", 45)?;
        terminal.clear()?;
        terminal.enters("echo code $?")?;
        terminal.shows("code 0", 20)?;
        terminal.is_usable()
    });
}

#[test]
fn the_terminal_is_usable_after_a_signal_and_after_ctrl_a_x() {
    lab(|lab| {
        let terminal = Terminal::open(lab)?;
        for signal in ["TERM", "INT", "HUP"] {
            terminal.clear()?;
            terminal.enters(&command(&vm().by_hand()))?;
            // Somewhere in the boot, with the terminal in raw mode for a while.
            lab.run("n=0; until pidof ringvm; do n=$((n + 1)); [ $n -lt 200 ] || exit 1; sleep 0.1; done")?;
            sleep(Duration::from_secs(2));
            lab.run(&format!("kill -{signal} $(pidof ringvm)"))?;
            terminal.prompts("L1#", 45)?;
            terminal.is_usable()?;
        }
        terminal.clear()?;
        terminal.enters(&command(&vm().by_hand()))?;
        terminal.prompts("guest#", 180)?;
        terminal.presses("C-a")?;
        terminal.presses("x")?;
        terminal.prompts("L1#", 45)?;
        terminal.is_usable()
    });
}
