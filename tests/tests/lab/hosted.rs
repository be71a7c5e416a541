//! A stock guest's vsock and its virtio console: the same checks of ours in this process, of ours in daemons, and of daemons of
//! others.

use std::time::Duration;

use ringvm_tests::Result;
use ringvm_tests::host::{Need, need};
use ringvm_tests::lab::{Exit, Guest, Lab, lab, vm};
use ringvm_tests::streams::{Streamed, is_of_a_lost_peer};

/// The variable with the bytes that each stream of the vsock has, for more than the usual.
const STREAM: &str = "RINGVM_LAB_STREAM";
const USUAL_STREAM: u64 = 32 << 20;
/// Connections that are open at once.
const MANY: u32 = 100;
/// The text that socat moves.
const TEXT: u32 = 300_000;

fn stream_bytes() -> u64 {
    std::env::var(STREAM).map_or(USUAL_STREAM, |bytes| bytes.parse().expect("a number of bytes"))
}

/// For so many bytes: TCG in TCG.
fn limit(bytes: u64) -> Duration {
    Duration::from_secs(240 + bytes / 500_000)
}

/// A program in L1 that goes on while the guest does its part.
struct Background<'a> {
    lab: &'a Lab,
    limit: Duration,
    words: String,
}

impl<'a> Background<'a> {
    fn start(lab: &'a Lab, limit: Duration, words: &str) -> Result<Self> {
        lab.run(&format!(
            "rm -f /run/background*; (({words}) >/run/background 2>&1; echo $? >/run/background.ended) &"
        ))?;
        Ok(Self { lab, limit, words: words.to_owned() })
    }

    /// Waits for its end; its exit code and what it said.
    fn wait(self) -> Result<(String, String)> {
        let ended = self
            .lab
            .run_for(self.limit, "until [ -s /run/background.ended ]; do sleep 0.1; done; cat /run/background.ended")?;
        Ok((ended, self.lab.run("cat /run/background")?))
    }

    /// Waits for its end, which must be a success; what it said.
    fn wait_ok(self) -> Result<String> {
        let words = self.words.clone();
        let (ended, said) = self.wait()?;
        assert_eq!(ended, "0", "L1: {words}: {said}");
        Ok(said)
    }
}

/// Streams between L1 and the guest, where one side listens. Both must have seen the same bytes.
fn stream(lab: &Lab, guest: &mut Guest, here: &str, there: &str) -> Result<()> {
    let bytes = stream_bytes();
    let ours = Background::start(lab, limit(bytes), &format!("lab-stream {here} {bytes}"))?;
    let theirs = guest.run_for(limit(bytes), &format!("lab-stream {there} {bytes}"))?;
    let ours = ours.wait_ok()?;
    let sums = [&ours, &theirs].map(|said| Streamed::read(said, bytes).sum);
    assert_eq!(sums[0], sums[1], "L1: {here}: {ours}; the guest: {there}: {theirs}");
    println!("{there}: {theirs}");
    Ok(())
}

/// What a guest with CID 3 can do with a vsock whose end in L1 is `socket`.
fn vsock(lab: &Lab, guest: &mut Guest, socket: &str) -> Result<()> {
    // Data both ways, over connections that the guest makes and over those that the host makes.
    stream(lab, guest, &format!("listen unix:{socket}_5000 receive"), "connect vsock:2:5000 send")?;
    stream(lab, guest, &format!("listen unix:{socket}_5001 send"), "connect vsock:2:5001 receive")?;
    stream(lab, guest, &format!("connect hybrid:{socket}:6000 send"), "listen vsock:3:6000 receive")?;
    stream(lab, guest, &format!("connect hybrid:{socket}:6001 receive"), "listen vsock:3:6001 send")?;
    many(lab, guest, socket, "many")
}

/// Connections that are open at once, of either side; `kind` is lab-stream's word for their end.
fn many(lab: &Lab, guest: &mut Guest, socket: &str, kind: &str) -> Result<()> {
    let usual = limit(0);
    let here = Background::start(lab, usual, &format!("lab-stream listen unix:{socket}_5002-{kind} {kind} {MANY}"))?;
    lab.run(&format!("ln -sf {socket}_5002-{kind} {socket}_5002"))?;
    guest.run_for(usual, &format!("lab-stream connect vsock:2:5002 {kind} {MANY}"))?;
    here.wait_ok()?;
    let here = Background::start(lab, usual, &format!("lab-stream connect hybrid:{socket}:6002 {kind} {MANY}"))?;
    guest.run_for(usual, &format!("lab-stream listen vsock:3:6002 {kind} {MANY}"))?;
    here.wait_ok().map(drop)
}

/// How connections end: one half after the other, with everything under way delivered, or in the middle. vhost-device-vsock 0.3
/// passes on neither the end of one half nor that a receiver has gone, and drops what is under way.
fn ends_of_connections(lab: &Lab, guest: &mut Guest, socket: &str) -> Result<()> {
    let (usual, long, text) = (limit(0), 1 << 30, format!("seq {TEXT}"));
    many(lab, guest, socket, "halves")?;
    // The tool that people use, and the handshake in clear.
    let sum = lab.run(&format!("{text} | md5sum"))?;
    let here = Background::start(lab, usual, &format!("socat -u UNIX-LISTEN:{socket}_5004 - | md5sum"))?;
    lab.run(&format!("until [ -S {socket}_5004 ]; do sleep 0.1; done"))?;
    guest.run_for(usual, &format!("{text} | socat -t 60 - VSOCK-CONNECT:2:5004"))?;
    assert_eq!(here.wait_ok()?.trim_end(), sum);
    guest.start("socat -u VSOCK-LISTEN:6004 - | md5sum; echo guest-has-it")?;
    // Until the guest listens, the connection ends without an answer.
    let connect = format!(
        "until (echo CONNECT 6004; {text}) | socat -t 60 - UNIX-CONNECT:{socket} | grep -q '^OK [0-9]'; do sleep 0.2; done"
    );
    lab.run_for(usual, &connect)?;
    assert_eq!(guest.expect_for(usual, "guest-has-it")?.trim(), sum);
    // A receiver that goes away in the middle: its sender is told.
    let here = Background::start(lab, usual, &format!("lab-stream listen unix:{socket}_5003 receive 100000"))?;
    let (code, said) = guest.status(&format!("lab-stream connect vsock:2:5003 send {long}"))?;
    assert!(code == 1 && is_of_a_lost_peer(&said), "code {code}: {said}");
    here.wait()?;
    let here = Background::start(lab, usual, &format!("lab-stream connect hybrid:{socket}:6003 send {long}"))?;
    let (code, said) = guest.status("lab-stream listen vsock:3:6003 receive 100000")?;
    assert!(code == 1 && said.contains("more came"), "code {code}: {said}");
    let (code, said) = here.wait()?;
    assert!(code == "1" && is_of_a_lost_peer(&said), "code {code}: {said}");
    Ok(())
}

/// A key is pressed at `address`, the end in L1 of a guest's console, and a text of so many lines comes out whole.
fn console(lab: &Lab, guest: &mut Guest, address: &str, lines: u32) -> Result<()> {
    guest.run("[ -c /dev/hvc0 ]")?;
    // vhost-device-console 0.1 drops input that comes before the first output.
    guest.run("echo press-a-key >/dev/hvc0")?;
    guest.run(&format!("(read line; seq {lines}; echo the-end) </dev/hvc0 >/dev/hvc0 2>&1 &"))?;
    lab.run_for(limit(0), &format!("lab-stream talk {address} '' the-end | tr -d '\r' >/run/said"))?;
    lab.run(&format!(
        "seq {lines} >/run/wanted && sed '/^$/d; /press-a-key/d; /the-end/d' /run/said | cmp - /run/wanted"
    ))
    .map(drop)
}

/// Somebody logs in at `address` and works there. Not with vhost-device-console 0.1, whose driver gets no more than one byte of
/// input right: it marks a buffer as used once for each byte.
fn login(lab: &Lab, guest: &mut Guest, address: &str) -> Result<()> {
    guest.run("mkdir -p /etc && echo \"root:$(mkpasswd -m md5 open-sesame):0:0:root:/:/bin/sh\" > /etc/passwd")?;
    guest.run("(while :; do getty -L hvc0 9600 vt100; done) >/dev/null 2>&1 & true")?;
    // On a slow machine a password may come before login(1) throws away what was typed, and is asked for again.
    let login = format!("until lab-stream talk {address} '' login: root Password: open-sesame '# '; do true; done");
    lab.run_for(limit(0), &login)?;
    // One client after another meets the same session. The terminal echoes what is typed, and not the answer.
    lab.run(&format!("lab-stream talk {address} 'echo $((40 + 2)) on $(tty)' '42 on /dev/hvc0'")).map(drop)
}

#[test]
fn a_stock_guest_has_sockets_and_a_console_in_either_place() {
    lab(|lab| {
        for place in ["process", "daemon"] {
            let (socket, end) = (format!("/run/v-{place}"), format!("/run/console-{place}"));
            let machine = vm()
                .arg("--vsock")
                .arg(&format!("cid=3,socket={socket},place={place}"))
                .arg("--console")
                .arg(&format!("socket={end},place={place}"));
            let mut guest = lab.boot(&machine.socat())?;
            vsock(lab, &mut guest, &socket)?;
            ends_of_connections(lab, &mut guest, &socket)?;
            console(lab, &mut guest, &format!("unix:{end}"), 20_000)?;
            login(lab, &mut guest, &format!("unix:{end}"))?;
            assert_eq!(guest.power_off()?, Exit::Code(0));
            lab.run(&format!("[ ! -e {socket} ] && [ ! -e {end} ]"))?;
        }
        Ok(())
    });
}

#[test]
fn a_stock_guest_has_sockets_and_a_console_of_others_daemons() {
    if !need(Need::Foreign) {
        return;
    }
    lab(|lab| {
        let start = |words: &str| lab.run(&format!("({words} >>/run/others.log 2>&1 & echo $!)"));
        let daemons = [
            start("vhost-device-vsock --vm guest-cid=3,socket=/run/others-v,uds-path=/run/v-others")?,
            start("vhost-device-console --socket-path /run/others-c --backend network --tcp-port 12345")?,
        ];
        lab.run("until [ -S /run/others-v ] && [ -S /run/others-c0 ]; do sleep 0.1; done")?;
        let machine = ["type=vsock,socket=/run/others-v", "type=console,socket=/run/others-c0,queue-size=128"]
            .iter()
            .fold(vm(), |vm, device| vm.arg("--vhost-user").arg(device));
        let mut guest = lab.boot(&machine.socat())?;
        vsock(lab, &mut guest, "/run/v-others")?;
        // vhost-device-console 0.1 drops what its socket does not take at once.
        console(lab, &mut guest, "127.0.0.1:12345", 500)?;
        assert_eq!(guest.power_off()?, Exit::Code(0));
        lab.run(&format!("kill {}", daemons.join(" "))).map(drop)
    });
}
