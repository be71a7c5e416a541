//! Readers that are connected and do not read.

use std::fmt::Debug;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::pipe::fcntl_setpipe_size;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use vmm_sys_util::epoll::Epoll;

use super::super::backlog::CAPACITY;
use super::super::stream::Stream;
use super::*;

const STALL: Duration = Duration::from_millis(100);

/// Keeps messages.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<String>>>);

impl Told {
    /// The messages with this in them.
    fn about(&self, what: &str) -> Vec<String> {
        self.0.lock().unwrap().iter().filter(|message| message.contains(what)).cloned().collect()
    }
}

impl Subscriber for Told {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Message(self));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Message<'a>(&'a Told);

impl Visit for Message<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.0.0.lock().unwrap().push(format!("{value:?}"));
        }
    }
}

/// A console with the limit of every day, whose output is a small pipe.
fn rig() -> (Rig, File) {
    let (read, write) = pipe();
    fcntl_setpipe_size(&write, 4096).unwrap();
    fcntl_setfl(&read, OFlags::NONBLOCK).unwrap();
    let rig = Rig::new(End::descriptors(null_input(), write));
    lock(&rig.console.work).host.stall.limit = STALL;
    (rig, read.into())
}

#[test]
fn a_reader_that_never_reads_stops_the_guest_for_a_moment_only() {
    let told = Told::default();
    let _guard = tracing::subscriber::set_default(told.clone());
    let (mut rig, mut read) = rig();
    let output = text(300_000);
    let start = Instant::now();
    rig.send_all(&output, 0x4000, || {});
    let waited = start.elapsed();
    assert!((STALL..STALL * 100).contains(&waited), "the guest waited for {waited:?}");
    assert_eq!((rig.tx.in_flight(), rig.positions(TRANSMITQ).1), (0, 19));
    assert_eq!(rig.pump(), 0, "nothing is waited for but the reader");
    assert_eq!(told.about("does not read").len(), 1);
    assert!(told.about("were dropped").is_empty());

    // What was kept, and what is said after there is room.
    let mut got = Vec::new();
    rig.until(|_| {
        drain(&mut read, &mut got);
        got.len() >= CAPACITY
    });
    assert!(got == output[..CAPACITY]);
    rig.send_all(b"after", 5, || {});
    rig.until(|_| {
        drain(&mut read, &mut got);
        got.len() > CAPACITY
    });
    assert_eq!(got[CAPACITY..], *b"after");
    drop(rig);
    let count = format!("{} bytes", output.len() - CAPACITY);
    let dropped = told.about("were dropped");
    assert!(dropped.len() == 1 && dropped[0].contains(&count), "{dropped:?}");
}

#[test]
fn a_reader_is_waited_for_again_once_half_of_the_backlog_is_free() {
    let (mut rig, mut read) = rig();
    rig.send_all(&text(150_000), 0x4000, || {});
    // A little room is not enough.
    let mut got = vec![0; 4096];
    io::Read::read_exact(&mut read, &mut got).unwrap();
    rig.pump();
    rig.send_all(b"dropped", 7, || {});
    rig.until(|_| {
        drain(&mut read, &mut got);
        got.len() >= CAPACITY
    });
    assert!(got == text(CAPACITY));
    // As before the stall: the guest's chains wait, and nothing is lost.
    got.clear();
    lock(&rig.console.work).host.stall.limit = Duration::from_secs(3600);
    let text = text(300_000);
    let mut pauses = 0;
    rig.send_all(&text, 0x4000, || {
        pauses += 1;
        if pauses % 10 == 0 {
            drain(&mut read, &mut got);
        }
    });
    rig.until(|_| {
        drain(&mut read, &mut got);
        got.len() >= text.len()
    });
    assert!(got == text);
}

#[test]
fn a_reader_that_reads_a_little_now_and_then_loses_nothing() {
    let (mut rig, mut read) = rig();
    // Long enough for a test that a busy machine keeps waiting, and less than all of it takes.
    lock(&rig.console.work).host.stall.limit = STALL * 10;
    let text = text(200_000);
    let (mut got, mut last) = (Vec::<u8>::new(), Instant::now());
    let mut sip = || {
        if last.elapsed() > STALL / 3 {
            last = Instant::now();
            let mut bytes = [0; 4096];
            let count = io::Read::read(&mut read, &mut bytes).unwrap_or(0);
            got.extend(&bytes[..count]);
        }
        got.len()
    };
    rig.send_all(&text, 0x4000, || {
        sip();
    });
    rig.until(|_| sip() >= text.len());
    assert!(got == text);
}

#[test]
fn a_long_chain_comes_back_from_a_reader_that_does_not_read() {
    let (mut rig, mut read) = rig();
    let text = text(300_000);
    rig.send(&text, &[text.len()]);
    rig.until(|rig| rig.sent() == 1);
    let mut got = Vec::new();
    rig.until(|_| {
        drain(&mut read, &mut got);
        got.len() >= CAPACITY + 4096
    });
    rig.send_all(b"!", 1, || {});
    rig.until(|_| {
        drain(&mut read, &mut got);
        got.ends_with(b"!")
    });
    got.pop();
    assert!(text.starts_with(&got), "{} bytes", got.len());
}

#[test]
fn the_next_client_gets_the_newest_output_after_one_that_did_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    let mut rig = Rig::new(socket_at(&path));
    lock(&rig.console.work).host.stall.limit = STALL;
    let first = UnixStream::connect(&path).unwrap();
    rig.pump();
    // More than any socket takes.
    let text = text(4 << 20);
    rig.send_all(&text, 0x4000, || {});
    drop(first);
    rig.pump();
    rig.send_all(&text[..200_000], 0x4000, || {});
    let mut next = UnixStream::connect(&path).unwrap();
    next.set_nonblocking(true).unwrap();
    let mut got = Vec::new();
    rig.until(|_| {
        drain(&mut next, &mut got);
        got.len() >= CAPACITY
    });
    assert!(got == text[200_000 - CAPACITY..200_000]);
}

#[test]
fn a_socket_has_room_as_soon_as_its_reader_has_read_a_little() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let epoll = Arc::new(Epoll::new().unwrap());
    let mut stream = Stream::own(File::from(std::os::fd::OwnedFd::from(ours)), &epoll, 0);
    let data = vec![1; CAPACITY];
    while stream.write(&data).is_ok() {}
    io::Read::read_exact(&mut theirs, &mut [0; 3 * 4096]).unwrap();
    assert!(stream.write(&data).is_ok());
}
