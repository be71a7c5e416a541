use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::thread;

use vhost::vhost_user::message::FrontendReq;

use super::*;
use crate::files::WrongFiles;
use crate::message::{self, GET_VRING_BASE_SKIP_DRAIN};

const LONG: Duration = Duration::from_secs(30);

fn pair() -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Connection::new(ours), theirs)
}

fn long() -> Limit {
    Limit::after(LONG)
}

fn short() -> Limit {
    Limit::after(Duration::from_millis(10))
}

fn say(mut stream: &UnixStream, words: &[u32]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    stream.write_all(&bytes).unwrap();
}

#[test]
fn a_message_comes_as_it_was_sent_with_its_descriptors() {
    let (ours, theirs) = pair();
    let mut theirs = Connection::new(theirs);
    let (out, into) = std::io::pipe().unwrap();
    let bytes = message::request(FrontendReq::SET_VRING_KICK, true, &7_u64.to_ne_bytes());
    ours.send(&bytes, &[out.as_fd()], long()).unwrap();
    let came = theirs.receive_request(long()).unwrap().unwrap();
    assert_eq!((came.request, came.need_reply), (12, true));
    assert_eq!((came.parse_all::<u64>(), came.parse_all::<u32>(), came.parse::<u32>()), (Some(7), None, Some(7)));
    let files = came.files.unwrap();
    assert_eq!(files.len(), 1);
    assert!(rustix::io::fcntl_getfd(&files[0]).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    drop((files, out));
    assert!((&into).write_all(&[1]).is_err(), "nobody else has the pipe");
    drop(ours);
    assert!(theirs.receive_request(long()).unwrap().is_none());
}

#[test]
fn a_message_longer_than_the_socket_has_room_for_is_sent_whole() {
    let (ours, mut theirs) = pair();
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        theirs.read_to_end(&mut all).unwrap();
        all
    });
    let body: Vec<u8> = (0..4_u32 << 20).map(|at| (at / 3) as u8).collect();
    ours.send(&body, &[], long()).unwrap();
    drop(ours);
    assert!(reader.join().unwrap() == body);
}

#[test]
fn pitfall_54_an_answer_to_something_else_is_none() {
    let (mut ours, theirs) = pair();
    say(&theirs, &[45, 5, 8, 1, 77]);
    let answer = ours.receive_reply(GET_VRING_BASE_SKIP_DRAIN, long()).unwrap();
    assert_eq!(answer.body, [1_u32, 77].map(u32::to_ne_bytes).as_flattened());
    // Of another request; no answer; of another version; longer than any.
    for header in [[11, 5, 0], [45, 1, 0], [45, 6, 0], [45, 5, u32::MAX]] {
        let (mut ours, theirs) = pair();
        say(&theirs, &header);
        let error = ours.receive_reply(GET_VRING_BASE_SKIP_DRAIN, long()).unwrap_err();
        assert!(matches!(error, WireError::Header { .. } | WireError::Answer(11)), "{error}");
    }
    drop(theirs);
    assert!(matches!(ours.receive_reply(GET_VRING_BASE_SKIP_DRAIN, long()), Err(WireError::Gone)));
}

#[test]
fn an_answer_is_no_request() {
    let (mut ours, theirs) = pair();
    say(&theirs, &[2, 5, 0]);
    assert!(matches!(ours.receive_event(long()), Err(WireError::Header { request: 2, flags: 5, size: 0 })));
}

#[test]
fn pitfall_54_a_wait_ends_with_its_limit_and_not_before() {
    let (mut ours, theirs) = pair();
    assert!(!ours.has_more().unwrap());
    assert!(matches!(ours.receive_reply(1, short()), Err(WireError::Late(_))));
    for words in [&[1][..], &[1, 5, 8], &[1, 5, 8, 0]] {
        let (mut ours, theirs) = pair();
        say(&theirs, words);
        assert!(matches!(ours.receive_reply(1, short()), Err(WireError::Late(_))), "{words:?}");
        drop(theirs);
        assert!(matches!(ours.receive_reply(1, long()), Err(WireError::Gone | WireError::Cut)));
    }
    let late = thread::spawn(move || {
        thread::sleep(Duration::from_millis(30));
        say(&theirs, &[1, 5, 0]);
        theirs
    });
    assert_eq!(ours.receive_reply(1, long()).unwrap().request, 1);
    let _theirs = late.join().unwrap();
    let begun = Instant::now();
    assert!(matches!(ours.send(&vec![0; 4 << 20], &[], short()), Err(WireError::Unread(_))));
    assert!(begun.elapsed() < LONG);
}

#[test]
fn another_thread_ends_a_wait_by_ending_the_socket() {
    let (mut ours, _theirs) = pair();
    let handle = ours.as_fd().try_clone_to_owned().unwrap();
    let ender = thread::spawn(move || rustix::net::shutdown(handle, rustix::net::Shutdown::Both).unwrap());
    assert!(matches!(ours.receive_reply(1, long()), Err(WireError::Gone)));
    ender.join().unwrap();
}

#[test]
fn pitfall_44_descriptors_that_no_such_message_brings_are_closed() {
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let pipe = || OwnedFd::from(std::io::pipe().unwrap().0);
    let answer = |request: FrontendReq, files: Vec<OwnedFd>| {
        let (mut ours, theirs) = pair();
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        Connection::new(theirs).send(&message::reply(request.into(), &[]), &files, long()).unwrap();
        ours.receive_reply(request.into(), long()).unwrap().files
    };
    assert_eq!(answer(FrontendReq::GET_INFLIGHT_FD, vec![pipe()]).unwrap().len(), 1);
    let wrong = answer(FrontendReq::GET_INFLIGHT_FD, vec![pipe(), pipe()]).unwrap_err();
    assert_eq!(wrong, WrongFiles::TooMany { count: 2, most: 1 });
    let wrong = answer(FrontendReq::SET_FEATURES, vec![pipe()]).unwrap_err();
    assert_eq!(wrong, WrongFiles::TooMany { count: 1, most: 0 });
    assert_eq!(answer(FrontendReq::GET_INFLIGHT_FD, vec![null()]).unwrap_err(), WrongFiles::Strange);
}
