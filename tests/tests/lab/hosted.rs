//! A stock guest's vsock and its virtio console, served in this process and in daemons.

use std::time::Duration;

use ringvm_tests::Result;
use ringvm_tests::lab::{Exit, Guest, Lab, lab, vm};

/// How much is streamed each way.
const STREAM: u64 = 64 << 20;
/// TCG in TCG.
const LIMIT: Duration = Duration::from_secs(240);

/// What one side of `lab-stream` said: the checksum.
fn sum(said: &str) -> String {
    let word = |key: &str| said.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    assert_eq!(word("bytes"), Some(STREAM.to_string().as_str()), "{said}");
    word("sum").unwrap_or_else(|| panic!("lab-stream said: {said}")).to_owned()
}

/// Streams between L1 and the guest, where one side listens. Both must have seen the same bytes.
fn stream(lab: &Lab, guest: &mut Guest, here: &str, there: &str) -> Result<()> {
    lab.run(&format!("lab-stream {here} {STREAM} >/run/stream 2>&1 & echo $! >/run/stream.pid"))?;
    let theirs = guest.run_for(LIMIT, &format!("lab-stream {there} {STREAM}"))?;
    lab.run("n=0; while [ -d /proc/$(cat /run/stream.pid) ] && [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done")?;
    let ours = lab.run("cat /run/stream")?;
    assert_eq!(sum(&ours), sum(&theirs), "L1: {here}: {ours}; the guest: {there}: {theirs}");
    println!("{there}: {theirs}");
    Ok(())
}

#[test]
fn a_stock_guest_has_sockets_to_the_host_and_a_console_in_either_place() {
    lab(|lab| {
        for place in ["process", "daemon"] {
            let (socket, login) = (format!("/run/v-{place}"), format!("/run/login-{place}"));
            let machine = vm()
                .arg("--vsock")
                .arg(&format!("cid=3,socket={socket},place={place}"))
                .arg("--console")
                .arg(&format!("socket={login},place={place}"));
            let mut guest = lab.boot(&machine)?;
            // The guest connects to the host, and the host to the guest.
            stream(lab, &mut guest, &format!("listen unix:{socket}_5000 receive"), "connect vsock:2:5000 send")?;
            stream(lab, &mut guest, &format!("listen unix:{socket}_5001 send"), "connect vsock:2:5001 receive")?;
            stream(lab, &mut guest, &format!("connect hybrid:{socket}:6000 send"), "listen vsock:3:6000 receive")?;
            stream(lab, &mut guest, &format!("connect hybrid:{socket}:6001 receive"), "listen vsock:3:6001 send")?;
            // A shell on the virtio console, which somebody on the host talks to.
            guest.run("ls /dev/hvc0 && (setsid sh </dev/hvc0 >/dev/hvc0 2>&1 &)")?;
            let said = lab.run(&format!("lab-stream talk unix:{login} 'echo answer-$((40 + 2))' answer-42"))?;
            assert!(said.contains("answer-42"), "{said}");
            // One client after another.
            let said = lab.run(&format!("lab-stream talk unix:{login} 'cat /proc/version' Linux"))?;
            assert!(said.contains("Linux"), "{said}");
            assert_eq!(guest.power_off()?, Exit::Code(0));
            lab.run(&format!("[ ! -e {socket} ] && [ ! -e {login} ]"))?;
        }
        Ok(())
    });
}
