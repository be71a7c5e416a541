//! The daemons as an operator sees them: where clients come from, what is said, how they end.

mod common;

use std::fs::Permissions;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::client::{Client, FEATURES, running, words};
use common::{Daemon, PATIENCE, image, scratch};
use rustix::fs::FlockOperation;
use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use rustix::process::{Signal, Uid};
use vhost::vhost_user::message::FrontendReq;

/// A user of whom no process is here.
const NOBODY: u32 = 65534;

fn blk() -> Command {
    Command::new(env!("CARGO_BIN_EXE_ringvm-blk"))
}

fn capacity(client: &mut Client) -> u64 {
    let config = client.ask(FrontendReq::GET_CONFIG, &words(&[0, 8, 0]));
    u64::from_le_bytes(config[12..].try_into().unwrap()) * 512
}

/// Accepts, but not for ever.
fn accept(listener: &UnixListener) -> Client {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                return Client::over(stream);
            }
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn one_daemon_serves_many_devices_each_at_its_socket() {
    let dir = scratch();
    let socket = |n: u64| dir.path().join(format!("{n}.sock"));
    let mut command = blk();
    command.args(["--stats", "--name", "first"]);
    for n in 0..3 {
        command.arg("--socket").arg(socket(n)).arg("--disk").arg(format!("storage=null,size={}M", n + 1));
    }
    let daemon = Daemon::spawn(&mut command);
    daemon.wait_for("is ready", 3);
    let mut clients: Vec<Client> = (0..3).map(|n| Client::connect(&socket(n))).collect();
    for (n, client) in (0..).zip(&mut clients) {
        client.negotiate(FEATURES);
        assert_eq!(capacity(client), (n + 1) << 20);
    }
    drop(clients);
    let (client, _memory, mut ring) = running(&socket(1));
    ring.add(0, 0, None);
    ring.driver.publish();
    ring.kick();
    ring.used();
    daemon.signal(Signal::USR1);
    daemon.wait_for("disk1: 1 operations, 0 errors", 1);
    drop(client);
    let said = daemon.terminate();
    assert!(said[0].contains("first is ready at"), "{}", said.join("\n"));
    assert_eq!(said.iter().filter(|line| line.starts_with("disk1: 1 operations")).count(), 2, "--stats says it too");
    assert!((0..3).all(|n| !socket(n).exists()));
}

#[test]
fn a_daemon_may_be_the_one_that_connects() {
    let dir = scratch();
    let socket = dir.path().join("f.sock");
    let mut command = blk();
    command.arg("--client").arg("--socket").arg(&socket).args(["--disk", "storage=null,size=1M"]);
    let daemon = Daemon::spawn(&mut command);
    daemon.wait_for("is ready", 1);
    std::thread::sleep(Duration::from_millis(100));
    for _ in 0..2 {
        let listener = UnixListener::bind(&socket).unwrap();
        for _ in 0..2 {
            let mut client = accept(&listener);
            client.negotiate(FEATURES);
            assert_eq!(capacity(&mut client), 1 << 20);
        }
        // The frontend is gone for a while.
        drop(listener);
        std::fs::remove_file(&socket).unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
    daemon.terminate();
}

/// Lets children inherit a descriptor.
fn inheritable(fd: &impl std::os::fd::AsFd) {
    rustix::io::fcntl_setfd(fd, FdFlags::empty()).unwrap();
}

#[test]
fn an_inherited_socket_that_listens_is_served_for_ever_and_a_connected_one_once() {
    let dir = scratch();
    let socket = dir.path().join("i.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    inheritable(&listener);
    let fd = listener.as_raw_fd().to_string();
    let daemon = Daemon::spawn(blk().args(["--fd", &fd, "--disk", "storage=null,size=1M"]));
    drop(listener);
    daemon.wait_for("is ready", 1);
    for _ in 0..3 {
        Client::connect(&socket).negotiate(FEATURES);
    }
    daemon.terminate();
    assert!(socket.exists(), "whoever made it removes it");

    let (ours, theirs) = UnixStream::pair().unwrap();
    inheritable(&theirs);
    let fd = theirs.as_raw_fd().to_string();
    let daemon = Daemon::spawn(blk().args(["--fd", &fd, "--disk", "storage=null,size=1M"]));
    drop(theirs);
    let mut client = Client::over(ours);
    client.negotiate(FEATURES);
    assert_eq!(capacity(&mut client), 1 << 20);
    drop(client);
    let (status, said) = daemon.end();
    assert_eq!(status.code(), Some(0), "{}", said.join("\n"));
}

#[test]
fn sockets_of_a_service_manager_are_taken_and_it_is_told() {
    let dir = scratch();
    let socket = dir.path().join("s.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    inheritable(&listener);
    let manager = dir.path().join("notify");
    let datagrams = UnixDatagram::bind(&manager).unwrap();
    let other = UnixDatagram::bind_addr(
        &SocketAddr::from_abstract_name(format!("ringvm-test-{}", std::process::id())).unwrap(),
    );
    let other = other.unwrap();
    for (name, datagrams) in
        [(manager.display().to_string(), &datagrams), (format!("@ringvm-test-{}", std::process::id()), &other)]
    {
        datagrams.set_read_timeout(Some(PATIENCE)).unwrap();
        let script = format!(
            "exec 3<&{}; export LISTEN_FDS=1 LISTEN_PID=$$; exec {} --disk storage=null,size=1M",
            listener.as_raw_fd(),
            env!("CARGO_BIN_EXE_ringvm-blk"),
        );
        let daemon = Daemon::spawn(Command::new("sh").args(["-c", &script]).env("NOTIFY_SOCKET", name));
        let mut room = [0; 64];
        let mut told = || datagrams.recv(&mut room).map(|len| String::from_utf8_lossy(&room[..len]).into_owned());
        assert_eq!(told().unwrap(), "READY=1");
        Client::connect(&socket).negotiate(FEATURES);
        daemon.terminate();
        assert_eq!(told().unwrap(), "STOPPING=1");
    }
}

#[test]
fn a_socket_is_taken_over_only_if_nobody_serves_it() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    let mut first = Daemon::blk(&socket, "storage=null,size=1M");
    let second = Daemon::spawn(blk().arg("--socket").arg(&socket).args(["--disk", "storage=null,size=1M"]));
    let (status, said) = second.end();
    assert_eq!((status.code(), said.len()), (Some(2), 1), "{}", said.join("\n"));
    assert!(said[0].contains("another process serves it"), "{}", said[0]);
    Client::connect(&socket).negotiate(FEATURES);
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    assert!(socket.exists(), "what a killed daemon leaves");
    let third = Daemon::blk(&socket, "storage=null,size=1M");
    Client::connect(&socket).negotiate(FEATURES);
    third.terminate();
}

#[test]
fn a_socket_that_is_only_bound_yet_is_not_taken_from_its_daemon() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    // As another daemon has it between bind(2) and listen(2).
    let lock = std::fs::File::create(dir.path().join("b.sock.lock")).unwrap();
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
    let bound = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&bound, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
    let inode = || std::os::unix::fs::MetadataExt::ino(&socket.metadata().unwrap());
    let before = inode();
    fails(blk().arg("--socket").arg(&socket).args(["--disk", "storage=null,size=1M"]), 2, "b.sock.lock");
    assert_eq!(inode(), before);
    // What a daemon leaves that was killed at that moment.
    drop((lock, bound));
    Daemon::blk(&socket, "storage=null,size=1M").terminate();
}

#[test]
fn a_socket_that_somebody_else_has_made_meanwhile_stays() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    let daemon = Daemon::blk(&socket, "storage=null,size=1M");
    std::fs::remove_file(&socket).unwrap();
    let _listener = UnixListener::bind(&socket).unwrap();
    daemon.terminate();
    assert!(socket.exists());
}

#[test]
fn a_socket_has_the_mode_that_was_asked_for_whatever_the_umask_is() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    for (umask, options, mode) in [("0", "", 0o600), ("077", "--socket-mode 0660", 0o660)] {
        let script = format!("umask {umask}; exec \"$0\" \"$@\" {options} --disk storage=null,size=1M");
        let mut command = Command::new("sh");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_ringvm-blk"), "--socket"]).arg(&socket);
        let daemon = Daemon::spawn(&mut command);
        daemon.wait_for("is ready", 1);
        assert_eq!(socket.metadata().unwrap().permissions().mode() & 0o777, mode);
        daemon.terminate();
    }
}

/// Does something as a user who is nobody else here, on a thread of its own. Only root can.
fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let nobody = Uid::from_raw(NOBODY);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

#[test]
fn users_who_were_not_named_are_no_peers() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root can be several users");
    }
    // The target folder may lie where other users can't go, as in root's home.
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
    let socket = |name: &str| dir.path().join(name);
    let null = ["--disk", "storage=null,size=1M"];
    let nobody = NOBODY.to_string();
    // A client that may connect, but is not let in.
    let start = |options: &[&str]| {
        let mut command = blk();
        command.args(options).args(["--socket-mode", "0666", "--socket"]).arg(socket("l.sock")).args(null);
        let daemon = Daemon::spawn(&mut command);
        daemon.wait_for("is ready", 1);
        daemon
    };
    let daemon = start(&[]);
    assert!(as_nobody(|| Client::connect(&socket("l.sock"))).is_dropped());
    daemon.wait_for("a client of user 65534 is refused; --peer-uid 65534 would let it in", 1);
    Client::connect(&socket("l.sock")).negotiate(FEATURES);
    daemon.terminate();
    let daemon = start(&["--peer-uid", &nobody]);
    as_nobody(|| Client::connect(&socket("l.sock"))).negotiate(FEATURES);
    daemon.terminate();
    // A frontend that listens, and does not get the device.
    let listener = as_nobody(|| UnixListener::bind(socket("c.sock")).unwrap());
    let client = |options: &[&str]| {
        Daemon::spawn(blk().args(options).args(["--client", "--socket"]).arg(socket("c.sock")).args(null))
    };
    let daemon = client(&[]);
    daemon.wait_for("user 65534 listens, who may not have the device", 1);
    assert!(accept(&listener).is_dropped());
    daemon.terminate();
    let daemon = client(&["--peer-uid", &nobody]);
    // Some that the other has left may come first.
    common::wait("a daemon that serves", || {
        let mut client = accept(&listener);
        client.send(FrontendReq::GET_FEATURES, &[], &[]) && client.receive().is_some()
    });
    daemon.terminate();
}

#[test]
fn the_channel_of_a_disk_with_nothing_to_tell_stays_open() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    let daemon = Daemon::blk(&socket, "storage=null,size=1M");
    let mut client = Client::connect(&socket);
    client.negotiate(FEATURES);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    client.tell(FrontendReq::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    drop(theirs);
    assert_eq!(capacity(&mut client), 1 << 20);
    ours.set_nonblocking(true).unwrap();
    assert_eq!(ours.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    ours.set_nonblocking(false).unwrap();
    drop(client);
    assert_eq!(ours.read(&mut [0]).unwrap(), 0, "it ends with the session");
    daemon.terminate();
}

#[test]
fn it_ends_while_a_client_is_connected_and_does_io() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    let path = image(dir.path(), 16 << 20);
    let daemon = Daemon::blk(&socket, &format!("path={}", path.display()));
    let (mut client, _memory, mut ring) = running(&socket);
    for slot in 0..20 {
        ring.add(slot, slot * 8, Some(7));
    }
    ring.driver.publish();
    ring.kick();
    daemon.terminate();
    assert!(client.is_dropped());
    while ring.driver.next_used().is_some() {}
    for slot in 0..20 {
        if ring.status(slot) == 0 {
            assert_eq!(std::fs::read(&path).unwrap()[slot as usize * 4096], 7, "what was acknowledged is there");
        }
    }
}

fn fails(command: &mut Command, code: i32, text: &str) {
    let (status, said) = Daemon::spawn(command).end();
    assert_eq!((status.code(), said.len()), (Some(code), 1), "{command:?}: {}", said.join("\n"));
    assert!(said[0].contains(text), "{command:?}: {}", said[0]);
}

#[test]
fn every_mistake_is_one_clear_line() {
    let dir = scratch();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let file = file.to_str().unwrap();
    let null = "storage=null,size=1M";
    let free = dir.path().join("free.sock");
    let free = free.to_str().unwrap();
    for (args, text) in [
        (&[][..], "there is nothing to serve; describe a device with --disk"),
        (&["--disk", null], "nobody could connect: name a --socket"),
        (&["--disk", null, "--disk", null, "--socket", free], "1 sockets for 2 devices"),
        (&["--disk", null, "--name", "a", "--name", "b", "--socket", free], "2 names for 1 devices"),
        (
            &["--disk", "path=/nonexistent/x.img", "--socket", free],
            "/nonexistent/x.img: opening the image: No such file",
        ),
        (&["--disk", "pth=x", "--socket", free], "--disk pth=x: there is no key `pth`"),
        (&["--disk", "path=x,queues=0", "--socket", free], "queues=0 is not from 1"),
        (&["--disk", null, "--socket", "/nonexistent/x.sock"], "--socket /nonexistent/x.sock: No such file"),
        (&["--disk", null, "--socket", file], "a file that is no socket is there"),
        (&["--disk", null, "--socket", free, "--io-threads", "0"], "--io-threads 0"),
        (&["--disk", null, "--socket", free, "--io-threads", "x"], "invalid value 'x'"),
        (&["--disk", null, "--fd", "1"], "--fd 1: it is a standard stream"),
        (&["--disk", null, "--fd", "777"], "--fd 777: Bad file descriptor"),
        (&["--disk", null, "--disk", null, "--fd", "7", "--fd", "7"], "--fd 7 is given twice"),
        (&["--disk", null, "--client"], "--socket"),
        (&["--disk", null, "--socket", free, "--fd", "3"], "cannot be used with"),
        (&["--nonsense"], "unexpected argument '--nonsense'"),
    ] {
        fails(blk().args(args), 2, text);
        assert!(!Path::new(free).exists(), "{args:?} leaves nothing behind");
    }
    // Nothing that the daemon itself has opened is taken for what it was given.
    let script = "exec 5<&-; exec \"$0\" --disk storage=null,size=1M --fd 5";
    fails(Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_ringvm-blk")]), 2, "--fd 5: Bad file descriptor");
    let mut net = Command::new(env!("CARGO_BIN_EXE_ringvm-net"));
    fails(net.args(["--socket", free, "--net", "queues=2"]), 2, "no port is named");
    let mut net = Command::new(env!("CARGO_BIN_EXE_ringvm-net"));
    fails(net.args(["--socket", free]), 2, "--net");
}

#[test]
fn an_image_in_use_is_waited_for_but_not_for_ever() {
    let dir = scratch();
    let disk = format!("path={}", image(dir.path(), 1 << 20).display());
    let socket = |name: &str| dir.path().join(name);
    let mut first = Daemon::blk(&socket("a.sock"), &disk);
    let begun = Instant::now();
    fails(blk().arg("--socket").arg(socket("b.sock")).args(["--disk", &disk]), 2, "another process uses it");
    assert!(begun.elapsed() < Duration::from_secs(10));
    let second = Daemon::spawn(blk().arg("--socket").arg(socket("b.sock")).args(["--disk", &disk]));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(second.said().len(), 0, "it waits");
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    second.wait_for("is ready", 1);
    second.terminate();
}
