//! A machine that QEMU's TCG emulates, with a stock Debian kernel and a shell on its serial console, or with what its BIOS finds.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ringvm_tests::host::kernel_package;
use ringvm_tests::lab::guest_initramfs;
use ringvm_tests::native::{Running, program};
use ringvm_tests::paths;
use tempfile::TempDir;

use crate::{ok, scratch};

/// What the guest's init prints when its shell reads commands.
const READY: &str = "ringvm-lab: guest ready\n";
/// Measured: 5 s on an idle machine.
const START_LIMIT: Duration = Duration::from_secs(180);
const LIMIT: Duration = Duration::from_secs(60);
/// For the rest of a line that has begun: that of a command that has failed does not come.
const LIMIT_OF_A_LINE: Duration = Duration::from_secs(10);

/// Has QEMU take the successor of a daemon that is gone.
const RECONNECT: &str = ",reconnect=1";

/// A guest's kernel, and its initramfs in a directory of the guest's own.
fn files(fio: bool) -> (TempDir, PathBuf, PathBuf) {
    let folder = scratch();
    let package = ok(kernel_package());
    let mut tree = ok(guest_initramfs(&package, folder.path()));
    ok(paths::helper("lab-stream").and_then(|path| Ok(tree.binary("bin/lab-stream", &path)?)));
    if fio {
        ok(tree.tool("fio"));
    }
    let initramfs = folder.path().join("guest.cpio");
    ok(tree.write_cpio(&initramfs));
    (folder, package.image().to_owned(), initramfs)
}

/// A machine to be started.
pub(crate) struct Machine {
    options: Vec<String>,
    disks: u32,
}

/// A machine with two CPUs and memory that its devices can share.
pub(crate) fn machine() -> Machine {
    let mut machine = Machine { options: Vec::new(), disks: 0 };
    machine.add("--pdeathsig KILL qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max -smp 2 -m 640M");
    machine.add("-object memory-backend-memfd,id=m,size=640M,share=on -numa node,memdev=m");
    machine.add("-nodefaults -no-user-config -display none -monitor none -serial stdio");
    machine
}

impl Machine {
    fn add(&mut self, words: &str) {
        self.options.extend(words.split_whitespace().map(str::to_owned));
    }

    /// The connection to a daemon.
    fn connect(&mut self, name: &str, socket: &Path, more: &str) {
        let path = socket.display().to_string().replace(',', ",,");
        self.options.extend(["-chardev".to_owned(), format!("socket,id={name},path={path}{more}")]);
    }

    /// A disk that a daemon serves.
    pub(crate) fn disk(mut self, socket: &Path, queues: u16) -> Self {
        self.connect("blk", socket, RECONNECT);
        self.add(&format!("-device vhost-user-blk-pci,chardev=blk,num-queues={queues},queue-size=128"));
        self.disks += 1;
        self
    }

    /// A NIC that a daemon serves. With MSI-X QEMU 7.2 crashes under TCG, so there is none.
    pub(crate) fn nic(mut self, socket: &Path, pairs: u16, mac: &str) -> Self {
        self.connect("net", socket, RECONNECT);
        self.add(&format!("-netdev vhost-user,id=n,chardev=net,queues={pairs}"));
        let mq = if pairs > 1 { "on" } else { "off" };
        self.add(&format!("-device virtio-net-pci,netdev=n,mq={mq},mac={mac},vectors=0,romfile="));
        self
    }

    /// A vsock device that a daemon serves. The daemon knows the CID. QEMU 7.2 does not take a successor of this daemon.
    pub(crate) fn vsock(mut self, socket: &Path) -> Self {
        self.connect("vsock", socket, "");
        self.add("-device vhost-user-vsock-pci,chardev=vsock");
        self
    }

    /// Boots Debian's kernel and waits until its shell reads commands.
    pub(crate) fn boot(mut self, fio: bool) -> Guest {
        // On a busy host the emulated timer is late, and Linux, which checks it, takes it for one that is not connected.
        let append = "console=ttyS0 panic=-1 quiet no_timer_check lab.shell=driven";
        let append = format!("{append} lab.disks={}", self.disks);
        let (folder, kernel, initramfs) = files(fio);
        let words = ["-kernel".into(), kernel.display().to_string(), "-initrd".into()];
        self.options.extend(words.into_iter().chain([initramfs.display().to_string(), "-append".into(), append]));
        Guest::over(self.power_on(), folder)
    }

    /// Starts it, with what its BIOS finds to boot.
    pub(crate) fn power_on(self) -> Running {
        // setpriv has the kernel kill QEMU when the thread of the test ends, however it ends.
        ok(program("setpriv", self.options).start())
    }
}

/// A guest with a shell.
pub(crate) struct Guest {
    running: Running,
    /// Its files, which whoever runs it has open.
    _folder: TempDir,
    starts: usize,
    commands: u32,
}

/// A command that runs in the guest.
#[must_use]
pub(crate) struct Begun {
    command: String,
    begin: String,
    end: String,
}

impl Guest {
    /// A guest that boots in `running` with its console at stdin and stdout, and files in `folder`. Waits until its shell reads
    /// commands.
    pub(crate) fn over(running: Running, folder: TempDir) -> Self {
        let mut guest = Self { running, _folder: folder, starts: 0, commands: 0 };
        guest.ready();
        guest
    }

    /// Waits for the shell after one start more.
    fn ready(&mut self) {
        self.starts += 1;
        ok(self.running.expect_count(READY, self.starts, START_LIMIT));
    }

    /// Runs a shell command; its output. It must succeed.
    pub(crate) fn run(&mut self, command: &str) -> String {
        self.run_for(LIMIT, command)
    }

    /// The same with a time limit of its own.
    pub(crate) fn run_for(&mut self, limit: Duration, command: &str) -> String {
        let begun = self.begin(command);
        self.finish(&begun, limit)
    }

    /// Starts a shell command.
    pub(crate) fn begin(&mut self, command: &str) -> Begun {
        self.commands += 1;
        let number = self.commands;
        let quoted = command.replace('\'', r"'\''");
        self.send(&format!(
            "printf '\\nbegin-%d\\n' {number}; sh -c '{quoted}' </dev/null 2>&1; printf '\\nend-%d:%d:\\n' {number} $?"
        ));
        Begun { command: command.into(), begin: format!("\nbegin-{number}\n"), end: format!("\nend-{number}:") }
    }

    /// Whether a command has not come to its end.
    pub(crate) fn runs(&mut self, begun: &Begun) -> bool {
        !self.running.shown().contains(&begun.end)
    }

    /// What a command has printed so far.
    pub(crate) fn shown(&mut self, begun: &Begun) -> String {
        let shown = self.running.shown();
        let text = shown.split_once(&begun.begin).map_or("", |(_, text)| text);
        text.split_once(&begun.end).map_or(text, |(text, _)| text).trim_end_matches('\n').to_owned()
    }

    /// Waits for the end of a command, which must have succeeded; its output.
    pub(crate) fn finish(&mut self, begun: &Begun, limit: Duration) -> String {
        if let Err(e) = self.running.expect(&begun.end, limit) {
            panic!("running `{}` in the guest: {e}", begun.command);
        }
        ok(self
            .running
            .expect(&format!("{}0:\n", begun.end), LIMIT_OF_A_LINE)
            .map_err(|_| format!("`{}` failed in the guest: {}", begun.command, self.running.shown())));
        self.shown(begun)
    }

    /// Reboots and waits for the shell.
    pub(crate) fn reboot(&mut self) {
        self.send("reboot -f");
        self.ready();
    }

    /// Switches it off and waits for the end of QEMU.
    pub(crate) fn power_off(mut self) {
        self.send("poweroff -f");
        let ended = ok(self.running.end(LIMIT));
        assert_eq!(ended.code(), 0, "{}", ended.stderr);
    }

    fn send(&mut self, line: &str) {
        let stdin = self.running.stdin.as_mut().expect("QEMU's stdin is the guest's console");
        ok(stdin.write_all(format!("{line}\n").as_bytes()).and_then(|()| stdin.flush()));
    }
}
