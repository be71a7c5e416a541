//! What a daemon may do wrong, one by one. Each trigger passes messages on until its moment has come; the connection goes on for a
//! while afterwards, so that the guest meets what is left. `None` is that the moment did not come.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use ringvm_tests::interposer::*;
use rustix::fs::{MemfdFlags, OFlags, SealFlags};
use rustix::io::Errno;

/// How long something goes on that is done again and again.
const WHILE: Duration = Duration::from_millis(500);
/// Longer than a device waits for an answer.
const LONG: Duration = Duration::from_secs(4);
const PAUSE: Duration = Duration::from_millis(1);

type Act = Box<dyn Fn(&mut Link<'_>) -> Option<()>>;

/// What a daemon does wrong when this message comes.
type AtMessage = fn(&mut Link<'_>, u32) -> Option<()>;

/// Every message that a disk's daemon is sent.
const MESSAGES: [(&str, u32); 20] = [
    ("SET_OWNER", SET_OWNER),
    ("GET_FEATURES", GET_FEATURES),
    ("GET_PROTOCOL_FEATURES", GET_PROTOCOL_FEATURES),
    ("SET_PROTOCOL_FEATURES", SET_PROTOCOL_FEATURES),
    ("SET_BACKEND_REQ_FD", SET_BACKEND_REQ_FD),
    ("SET_FEATURES", SET_FEATURES),
    ("GET_CONFIG", GET_CONFIG),
    ("SET_CONFIG", SET_CONFIG),
    ("GET_INFLIGHT_FD", GET_INFLIGHT_FD),
    ("SET_INFLIGHT_FD", SET_INFLIGHT_FD),
    ("SET_MEM_TABLE", SET_MEM_TABLE),
    ("SET_VRING_NUM", SET_VRING_NUM),
    ("SET_VRING_ADDR", SET_VRING_ADDR),
    ("SET_VRING_BASE", SET_VRING_BASE),
    ("SET_VRING_CALL", SET_VRING_CALL),
    ("SET_VRING_ERR", SET_VRING_ERR),
    ("SET_VRING_KICK", SET_VRING_KICK),
    ("SET_VRING_ENABLE", SET_VRING_ENABLE),
    ("GET_VRING_BASE_SKIP_DRAIN", SKIP_DRAIN),
    ("RESET_DEVICE", RESET_DEVICE),
];

/// What is done at each message.
const AT_EACH: &[(&str, AtMessage)] = &[
    ("refused", |link, request| {
        let asks = [GET_FEATURES, GET_PROTOCOL_FEATURES, GET_CONFIG, GET_INFLIGHT_FD, SKIP_DRAIN].contains(&request);
        // Of what has an answer of its own, an empty one is a refusal.
        let body = if asks { Vec::new() } else { 1_u64.to_ne_bytes().to_vec() };
        let answer = Message::answer(request, body);
        link.until(request)?;
        link.answer(&answer)?;
        // The first may have come with what the driver had set up before, the next come from the driver itself.
        (0..2).try_for_each(|_| link.until(request).and_then(|_| link.answer(&answer)));
        Some(())
    }),
    ("left", |link, request| {
        link.until(request)?;
        link.leave();
        Some(())
    }),
];

/// What is done to each answer.
const TO_EACH_ANSWER: &[(&str, AtMessage)] = &[
    ("cut-and-left", |link, request| {
        let bytes = link.until_answer(request)?.bytes();
        link.say(&bytes[..bytes.len() - 3], &[])?;
        link.leave();
        Some(())
    }),
    ("header-cut-and-left", |link, request| {
        let bytes = link.until_answer(request)?.bytes();
        link.say(&bytes[..7], &[])?;
        link.leave();
        Some(())
    }),
    ("too-long", |link, request| {
        let mut answer = link.until_answer(request)?;
        answer.body.extend([0xa5; 64]);
        link.answer(&answer)
    }),
    ("says-another-size", |link, request| {
        let mut bytes = link.until_answer(request)?.bytes();
        bytes[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        link.say(&bytes, &[])
    }),
    ("for-another-message", |link, request| {
        let mut answer = link.until_answer(request)?;
        answer.request ^= 1;
        link.answer(&answer)
    }),
    ("not-marked-as-one", |link, request| {
        let mut answer = link.until_answer(request)?;
        answer.flags = 1;
        link.answer(&answer)
    }),
    ("twice", |link, request| {
        let answer = link.until_answer(request)?;
        link.answer(&answer)?;
        link.answer(&answer)
    }),
    ("with-descriptors", |link, request| {
        let mut answer = link.until_answer(request)?;
        answer.files.extend((0..30).map(|_| null()));
        link.answer(&answer)
    }),
    ("garbage", |link, request| {
        let mut answer = link.until_answer(request)?;
        answer.body.iter_mut().for_each(|byte| *byte = 0xff);
        link.answer(&answer)
    }),
];

/// Messages at which a daemon hangs, each of which the guest waits out; every other one in the middle of its answer.
const HANGS: [u32; 8] = [
    GET_FEATURES,
    GET_PROTOCOL_FEATURES,
    SET_FEATURES,
    GET_CONFIG,
    SET_MEM_TABLE,
    SET_VRING_KICK,
    SKIP_DRAIN,
    RESET_DEVICE,
];

type Special = fn(&mut Link<'_>) -> Option<()>;

const SPECIAL: &[(&str, Special)] = &[
    ("no-features", |link| with_number(link, GET_FEATURES, 0, 0)),
    ("all-features", |link| with_number(link, GET_FEATURES, 0, u64::MAX)),
    ("no-protocol-features", |link| with_number(link, GET_PROTOCOL_FEATURES, 0, 0)),
    ("all-protocol-features", |link| with_number(link, GET_PROTOCOL_FEATURES, 0, u64::MAX)),
    ("ring-position-of-another", |link| with_number(link, SKIP_DRAIN, 0, 7)),
    ("ring-position-too-large", |link| with_number(link, SKIP_DRAIN, 0, u64::MAX << 32)),
    ("config-of-no-disk", |link| {
        let mut answer = link.until_answer(GET_CONFIG)?;
        answer.body[12..].fill(0);
        link.answer(&answer)
    }),
    ("config-short", |link| {
        let mut answer = link.until_answer(GET_CONFIG)?;
        answer.body.truncate(12 + 8);
        link.answer(&answer)
    }),
    ("config-of-another-place", |link| {
        let mut answer = link.until_answer(GET_CONFIG)?;
        answer.body[..4].copy_from_slice(&0x1000_u32.to_ne_bytes());
        link.answer(&answer)
    }),
    // Sizes, offsets and files of the table of requests in flight.
    ("inflight-huge", |link| with_number(link, GET_INFLIGHT_FD, 0, u64::MAX)),
    ("inflight-petabyte", |link| with_table(link, 1 << 50, 0, table(1 << 50))),
    ("inflight-nothing", |link| with_number(link, GET_INFLIGHT_FD, 0, 0)),
    ("inflight-far-away", |link| with_number(link, GET_INFLIGHT_FD, 8, u64::MAX)),
    ("inflight-empty-file", |link| with_table(link, 1 << 20, 0, table(0))),
    ("inflight-device", |link| with_table(link, 1 << 20, 0, null())),
    ("inflight-pipe", |link| with_table(link, 1 << 20, 0, std::io::pipe().ok()?.0.into())),
    ("inflight-no-file", |link| {
        let mut answer = link.until_answer(GET_INFLIGHT_FD)?;
        answer.files.clear();
        link.answer(&answer)
    }),
    ("inflight-cut-later", |link| {
        link.until_running()?;
        let table = link.kept.inflight.as_ref()?;
        // A daemon may have sealed it.
        let _ = rustix::fs::ftruncate(table, 0);
        Some(())
    }),
    // What the other side owns as much as we do.
    ("kick-full-and-blocking", |link| {
        link.until_running()?;
        link.kept.kicks.values().for_each(fill);
        link.leave();
        Some(())
    }),
    ("call-full-and-blocking", |link| {
        link.until_running()?;
        link.kept.calls.values().for_each(fill);
        link.leave();
        Some(())
    }),
    ("call-full-and-blocking-while-connected", |link| {
        link.until_running()?;
        link.kept.calls.values().for_each(fill);
        link.pass_for(WHILE)
    }),
    ("call-empty-and-blocking", |link| {
        link.until_running()?;
        // The guest resets the device meanwhile, masked and with MSI-X off.
        link.pass_while(WHILE, PAUSE, |kept| kept.calls.values().for_each(drain))
    }),
    ("kick-empty-and-blocking", |link| {
        link.until_running()?;
        link.pass_while(WHILE, PAUSE, |kept| kept.kicks.values().for_each(drain))
    }),
    ("err-full-and-blocking", |link| {
        link.until_running()?;
        link.pass_while(WHILE, PAUSE, |kept| kept.errs.values().for_each(fill))
    }),
    ("err-empty-and-blocking", |link| {
        link.until_running()?;
        link.pass_while(WHILE, PAUSE, |kept| {
            for err in kept.errs.values() {
                fill(err);
                drain(err);
            }
        })
    }),
    ("call-flood", |link| {
        link.until_running()?;
        link.pass_while(WHILE, Duration::from_micros(20), |kept| kept.calls.values().for_each(raise))
    }),
    ("kick-flood", |link| {
        link.until_running()?;
        link.pass_while(WHILE, Duration::from_micros(20), |kept| kept.kicks.values().for_each(raise))
    }),
    ("descriptors-of-dead-connections", |link| {
        let all = [&link.kept.kicks, &link.kept.calls, &link.kept.errs];
        all.into_iter().flat_map(|events| events.values()).for_each(fill);
        link.until_running()?;
        link.pass_while(WHILE, PAUSE, |kept| {
            [&kept.kicks, &kept.calls, &kept.errs].into_iter().flat_map(|events| events.values()).for_each(drain);
        })
    }),
    ("memory-cut", |link| {
        link.until_running()?;
        for memory in &link.kept.memory {
            assert_eq!(rustix::fs::ftruncate(memory, 4096), Err(Errno::PERM), "the guest's memory can be cut short");
            assert_eq!(
                rustix::fs::ftruncate(memory, 1 << 40),
                Err(Errno::PERM),
                "the guest's memory can be made longer"
            );
            let sealed = rustix::fs::fcntl_add_seals(memory, SealFlags::FUTURE_WRITE);
            assert_eq!(sealed, Err(Errno::PERM), "the guest's memory can be sealed");
        }
        Some(())
    }),
    // Requests of the daemon's own.
    ("config-change-flood", |link| {
        link.until_running()?;
        link.pass_while(WHILE, Duration::from_micros(20), |kept| {
            (0..32).for_each(|_| kept.event(&event(2, 1, &[]), &[]))
        })
    }),
    ("events-whose-answers-nobody-reads", |link| {
        link.until_running()?;
        // With an answer each, until their socket is full.
        link.pass_while(LONG, PAUSE, |kept| (0..64).for_each(|_| kept.event(&event(2, 1 | 8, &[]), &[])));
        Some(())
    }),
    ("event-of-no-kind", |link| link.event_when_running(&event(77, 1 | 8, &[0; 16]), 0)),
    ("event-of-another-version", |link| link.event_when_running(&event(2, 3, &[]), 0)),
    ("event-that-is-an-answer", |link| link.event_when_running(&event(2, ANSWER, &[0; 8]), 0)),
    ("event-too-long", |link| link.event_when_running(&[2_u32, 1, u32::MAX].map(u32::to_ne_bytes).concat(), 0)),
    ("event-for-shared-memory", |link| link.event_when_running(&event(9, 1 | 8, &[0xff; 40]), 1)),
    ("event-with-descriptors", |link| link.event_when_running(&event(2, 1, &[]), 30)),
    ("event-cut", |link| {
        link.event_when_running(&event(2, 1, &[])[..5], 0)?;
        // Whoever waits for the rest does not wait for ever.
        link.pass_for(LONG);
        Some(())
    }),
    ("event-channel-closed", |link| {
        link.until_running()?;
        let events = link.kept.events.take()?;
        let _ = rustix::net::shutdown(&events, rustix::net::Shutdown::Both);
        Some(())
    }),
    ("answers-unasked", |link| {
        link.until_running()?;
        let answer = Message::answer(GET_CONFIG, vec![0; 72]);
        // Until nobody takes them any more.
        (0..8).try_for_each(|_| link.answer(&answer));
        Some(())
    }),
    ("silent-while-running", |link| {
        link.until_running()?;
        link.hang()
    }),
];

/// All triggers with their names.
pub(crate) fn all() -> Vec<(String, Act)> {
    let mut all: Vec<(String, Act)> = Vec::new();
    for &(name, request) in &MESSAGES {
        for &(what, act) in AT_EACH {
            all.push((format!("{name}-{what}"), Box::new(move |link| act(link, request))));
        }
        // These have no answers.
        if [SET_OWNER, SET_PROTOCOL_FEATURES].contains(&request) {
            continue;
        }
        for &(what, act) in TO_EACH_ANSWER {
            all.push((format!("{name}-answer-{what}"), Box::new(move |link| act(link, request))));
        }
    }
    for (number, &request) in HANGS.iter().enumerate() {
        let name = MESSAGES.iter().find(|known| known.1 == request).map_or("", |known| known.0);
        let half = number % 2 == 1;
        let act = move |link: &mut Link<'_>| {
            let answer = link.until_answer(request)?.bytes();
            link.say(&answer[..if half { answer.len() - 1 } else { 0 }], &[])?;
            link.hang()
        };
        all.push((format!("{name}-hangs{}", if half { "-in-its-answer" } else { "" }), Box::new(act)));
    }
    all.extend(SPECIAL.iter().map(|&(name, act)| (name.to_owned(), Box::new(act) as Act)));
    all
}

/// Those that a machine may meet at its end.
pub(crate) fn at_the_end() -> Vec<(String, Act)> {
    const NAMES: [&str; 11] = [
        "GET_VRING_BASE_SKIP_DRAIN-hangs",
        "RESET_DEVICE-hangs-in-its-answer",
        "GET_VRING_BASE_SKIP_DRAIN-refused",
        "RESET_DEVICE-refused",
        "GET_VRING_BASE_SKIP_DRAIN-answer-garbage",
        "RESET_DEVICE-answer-too-long",
        "kick-full-and-blocking",
        "call-full-and-blocking-while-connected",
        "call-empty-and-blocking",
        "events-whose-answers-nobody-reads",
        "event-cut",
    ];
    let chosen: Vec<_> = all().into_iter().filter(|(name, _)| NAMES.contains(&name.as_str())).collect();
    assert_eq!(chosen.len(), NAMES.len(), "each is one of all");
    chosen
}

/// More that can be done with a connection.
trait Hostile {
    fn event_when_running(&mut self, bytes: &[u8], files: usize) -> Option<()>;
}

impl Hostile for Link<'_> {
    fn event_when_running(&mut self, bytes: &[u8], files: usize) -> Option<()> {
        self.until_running()?;
        self.kept.event(bytes, &(0..files).map(|_| null()).collect::<Vec<_>>());
        Some(())
    }
}

/// An answer with another number in it.
fn with_number(link: &mut Link<'_>, request: u32, at: usize, number: u64) -> Option<()> {
    let mut answer = link.until_answer(request)?;
    answer.set(at, number);
    link.answer(&answer)
}

/// Another table of requests in flight.
fn with_table(link: &mut Link<'_>, size: u64, offset: u64, file: OwnedFd) -> Option<()> {
    let mut answer = link.until_answer(GET_INFLIGHT_FD)?;
    answer.set(0, size);
    answer.set(8, offset);
    answer.files = vec![file];
    link.answer(&answer)
}

fn table(len: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create("table", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
    let file = file.expect("memory for a table");
    rustix::fs::ftruncate(&file, len).expect("a file of holes");
    file
}

fn null() -> OwnedFd {
    File::open("/dev/null").expect("Linux has /dev/null").into()
}

fn event(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    Message { request, flags, body: body.to_vec(), files: Vec::new() }.bytes()
}

/// Whether reads and writes wait belongs to all who hold the event.
fn set_blocking(event: &OwnedFd, blocking: bool) {
    let flags = if blocking { OFlags::empty() } else { OFlags::NONBLOCK };
    rustix::fs::fcntl_setfl(event.as_fd(), flags).expect("flags of an event");
}

/// Leaves an event so full that another write waits.
fn fill(event: &OwnedFd) {
    drain(event);
    set_blocking(event, false);
    // Others may raise it as well.
    let _ = rustix::io::write(event, &(u64::MAX - 1).to_ne_bytes());
    set_blocking(event, true);
}

/// Leaves an event so empty that another read waits.
fn drain(event: &OwnedFd) {
    set_blocking(event, false);
    let _ = rustix::io::read(event, &mut [0; 8]);
    set_blocking(event, true);
}

fn raise(event: &OwnedFd) {
    set_blocking(event, false);
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}
