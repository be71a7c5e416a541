//! Streams random data over one connection (TCP, a Unix socket, a vsock) and says at both ends how much it was and what its
//! checksum is; keeps many connections open at once and has each echo what it was sent, at once or when one half is closed; or
//! says a text and waits for another.
//! The lab's guests run emulated: the generator and the checksum take a few instructions for eight bytes, so that the network
//! is what is measured. Every wait has a limit.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::rand::{GetRandomFlags, getrandom};
use vsock::{VsockListener, VsockStream};

const USAGE: &str = "usage: lab-stream listen|connect ADDRESS send|receive BYTES
       lab-stream listen|connect ADDRESS many|halves CONNECTIONS
       lab-stream talk ADDRESS TEXT ANSWER [TEXT ANSWER]...
An ADDRESS is IP:PORT, unix:PATH, vsock:CID:PORT or, to connect to a guest's port, hybrid:PATH:PORT";
/// For the other side to come, and between two pieces of data.
const LIMIT: Duration = Duration::from_secs(60);
const PIECE: usize = 256 << 10;
/// For a person to begin to type.
const TYPING: Duration = Duration::from_millis(300);
/// What each of many connections carries there and back.
const ECHO: usize = 20_000;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("lab-stream {}: {e}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

/// A connection of any kind.
trait Stream: Read + Write + Send {
    /// Limits the time that a read or a write takes.
    fn limit(&self) -> io::Result<()>;
    /// Says that nothing more is sent.
    fn finish(&self) -> io::Result<()>;
}

macro_rules! streams {
    ($($stream:ty),*) => {
        $(impl Stream for $stream {
            fn limit(&self) -> io::Result<()> {
                self.set_read_timeout(Some(LIMIT))?;
                self.set_write_timeout(Some(LIMIT))
            }

            fn finish(&self) -> io::Result<()> {
                self.shutdown(std::net::Shutdown::Write)
            }
        })*
    };
}

streams!(TcpStream, UnixStream, VsockStream);

/// Where the other side is.
enum Address {
    Tcp(SocketAddr),
    Unix(String),
    Vsock(u32, u32),
    /// The host's end of a guest's vsock, and a port there.
    Hybrid(String, u32),
}

impl Address {
    fn parse(text: &str) -> Option<Self> {
        let (kind, rest) = text.split_once(':')?;
        let with_port = || {
            let (place, port) = rest.rsplit_once(':')?;
            Some((place, port.parse::<u32>().ok()?))
        };
        match kind {
            "unix" => Some(Self::Unix(rest.to_owned())),
            "vsock" => with_port().and_then(|(cid, port)| Some(Self::Vsock(cid.parse().ok()?, port))),
            "hybrid" => with_port().map(|(path, port)| Self::Hybrid(path.to_owned(), port)),
            _ => text.parse().ok().map(Self::Tcp),
        }
    }
}

fn run(words: &[String]) -> io::Result<String> {
    let usage = || io::Error::new(io::ErrorKind::InvalidInput, USAGE);
    let [side, address, words @ ..] = words else { return Err(usage()) };
    let address = Address::parse(address).ok_or_else(usage)?;
    if side == "talk" {
        return talk(connect(&address)?, words);
    }
    let [direction, count] = words else { return Err(usage()) };
    let bytes: u64 = count.parse().map_err(|_| usage())?;
    let stream = match (side.as_str(), direction.as_str()) {
        ("listen", "many" | "halves") => return echo(&mut listen(&address)?, bytes, direction == "halves"),
        ("connect", "many" | "halves") => return echoed(&address, bytes, direction == "halves"),
        ("listen", _) => listen(&address)?()?,
        ("connect", _) => connect(&address)?,
        _ => return Err(usage()),
    };
    stream.limit()?;
    let begun = Instant::now();
    let (bytes, sum) = match direction.as_str() {
        "send" => send(stream, bytes)?,
        "receive" => receive(stream, bytes)?,
        _ => return Err(usage()),
    };
    let milliseconds = begun.elapsed().as_millis();
    Ok(format!("bytes={bytes} sum={sum:016x} milliseconds={milliseconds}"))
}

/// Says lines, each with the text that must come before the next is said. Shows all that came.
fn talk(mut stream: Box<dyn Stream>, words: &[String]) -> io::Result<String> {
    stream.limit()?;
    let mut all = Vec::new();
    for pair in words.chunks(2) {
        let [text, answer] = pair else { return Err(io::Error::new(io::ErrorKind::InvalidInput, USAGE)) };
        // A program that has just asked may throw away what was typed before.
        thread::sleep(TYPING);
        stream.write_all(text.as_bytes())?;
        stream.write_all(b"\n")?;
        let from = all.len();
        while !all[from..].ends_with(answer.as_bytes()) {
            let mut byte = [0];
            stream.read_exact(&mut byte).map_err(|error| {
                let heard = String::from_utf8_lossy(&all[from..]);
                io::Error::new(error.kind(), format!("{error}, waiting for {answer:?}; so far: {heard:?}"))
            })?;
            all.push(byte[0]);
        }
    }
    Ok(String::from_utf8_lossy(&all).into_owned())
}

/// Takes so many connections, and once all are there sends each what it sent: at its end, or at that of one half.
fn echo(accept: &mut Accept, count: u64, halves: bool) -> io::Result<String> {
    let streams = (0..count).map(|_| accept()).collect::<io::Result<Vec<_>>>()?;
    for_each(streams, |mut stream| {
        stream.limit()?;
        let mut bytes = vec![0; if halves { ECHO + 1 } else { ECHO }];
        let len = fill(&mut stream, &mut bytes)?;
        stream.write_all(&bytes[..len])?;
        if halves { stream.finish() } else { ended(&mut stream) }
    })
}

/// Makes so many connections, and once all are there expects of each what it sends.
fn echoed(address: &Address, count: u64, halves: bool) -> io::Result<String> {
    let streams = (0..count).map(|_| connect(address)).collect::<io::Result<Vec<_>>>()?;
    for_each(streams, |mut stream| {
        stream.limit()?;
        let mut seed = [0; 8];
        getrandom(&mut seed, GetRandomFlags::empty())?;
        let mut sent = vec![0; ECHO];
        Random(u64::from_ne_bytes(seed)).fill(&mut sent);
        stream.write_all(&sent)?;
        if halves {
            // The other side may still send.
            stream.finish()?;
        }
        let mut echo = vec![0; if halves { ECHO + 1 } else { ECHO }];
        let len = fill(&mut stream, &mut echo)?;
        if echo[..len] == sent { Ok(()) } else { Err(io::Error::other("another text came back")) }
    })
}

/// Waits until the other side closes the connection. It must send nothing more.
fn ended(stream: &mut Box<dyn Stream>) -> io::Result<()> {
    match fill(stream, &mut [0])? {
        0 => Ok(()),
        _ => Err(io::Error::other("more came than that")),
    }
}

/// Serves connections at the same time, and says how many went well.
fn for_each(
    streams: Vec<Box<dyn Stream>>,
    serve: impl Fn(Box<dyn Stream>) -> io::Result<()> + Sync,
) -> io::Result<String> {
    let count = streams.len();
    thread::scope(|scope| {
        let serve = &serve;
        let threads: Vec<_> = streams.into_iter().map(|stream| scope.spawn(move || serve(stream))).collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("no thread panics")).collect();
        let failed = results.iter().filter(|result| result.is_err()).count();
        match results.into_iter().find_map(Result::err) {
            Some(first) => Err(io::Error::new(first.kind(), format!("{failed} of {count} failed, the first: {first}"))),
            None => Ok(format!("connections={count}")),
        }
    })
}

/// Gives the next connection.
type Accept = Box<dyn FnMut() -> io::Result<Box<dyn Stream>>>;

fn listen(address: &Address) -> io::Result<Accept> {
    let wait = |listener: &dyn AsFd| {
        let limit = Timespec { tv_sec: LIMIT.as_secs().cast_signed(), tv_nsec: 0 };
        match poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&limit))? {
            0 => Err(io::Error::new(io::ErrorKind::TimedOut, "nobody connects")),
            _ => Ok(()),
        }
    };
    Ok(match address {
        Address::Tcp(address) => {
            let listener = TcpListener::bind(address)?;
            Box::new(move || wait(&listener).and_then(|()| Ok(Box::new(listener.accept()?.0) as _)))
        }
        Address::Unix(path) => {
            let listener = UnixListener::bind(path)?;
            Box::new(move || wait(&listener).and_then(|()| Ok(Box::new(listener.accept()?.0) as _)))
        }
        Address::Vsock(cid, port) => {
            let listener = VsockListener::bind_with_cid_port(*cid, *port)?;
            Box::new(move || wait(&listener).and_then(|()| Ok(Box::new(listener.accept()?.0) as _)))
        }
        Address::Hybrid(..) => return Err(io::Error::new(io::ErrorKind::InvalidInput, USAGE)),
    })
}

/// Connects to a listener that may come later than this.
fn connect(address: &Address) -> io::Result<Box<dyn Stream>> {
    let begun = Instant::now();
    loop {
        let attempt: io::Result<Box<dyn Stream>> = match address {
            Address::Tcp(address) => TcpStream::connect_timeout(address, LIMIT).map(|stream| Box::new(stream) as _),
            Address::Unix(path) => UnixStream::connect(path).map(|stream| Box::new(stream) as _),
            Address::Vsock(cid, port) => {
                VsockStream::connect_with_cid_port(*cid, *port).map(|stream| Box::new(stream) as _)
            }
            Address::Hybrid(path, port) => hybrid(path, *port).map(|stream| Box::new(stream) as _),
        };
        match attempt {
            Err(_) if begun.elapsed() < LIMIT => thread::sleep(Duration::from_millis(100)),
            done => return done,
        }
    }
}

/// Connects to a guest's port by way of the host's end.
fn hybrid(path: &str, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.limit()?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        // Without a listener in the guest the connection just ends.
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    if line.starts_with(b"OK ") { Ok(stream) } else { Err(io::Error::other("the answer is not OK")) }
}

fn send(mut stream: Box<dyn Stream>, bytes: u64) -> io::Result<(u64, u64)> {
    let mut seed = [0; 8];
    getrandom(&mut seed, GetRandomFlags::empty())?;
    let mut random = Random(u64::from_ne_bytes(seed));
    let (mut sum, mut sent, mut piece) = (Sum::default(), 0, vec![0; PIECE]);
    while sent < bytes {
        let piece = &mut piece[..(bytes - sent).min(PIECE as u64) as usize];
        random.fill(piece);
        sum.add(piece);
        stream.write_all(piece)?;
        sent += piece.len() as u64;
    }
    // The other side says when it has all of it: what is under way is not cut off.
    match fill(&mut stream, &mut [0])? {
        1 => Ok((sent, sum.0)),
        _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other side ended before it had everything")),
    }
}

/// Takes so many bytes, says so, and waits for the end of the stream.
fn receive(mut stream: Box<dyn Stream>, bytes: u64) -> io::Result<(u64, u64)> {
    let (mut sum, mut received, mut piece) = (Sum::default(), 0, vec![0; PIECE]);
    while received < bytes {
        let wanted = (bytes - received).min(PIECE as u64) as usize;
        let count = fill(&mut stream, &mut piece[..wanted])?;
        sum.add(&piece[..count]);
        received += count as u64;
        if count < wanted {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{received} bytes came")));
        }
    }
    stream.write_all(&[0])?;
    ended(&mut stream)?;
    Ok((received, sum.0))
}

/// Reads until `piece` is full or the stream ends.
fn fill(stream: &mut Box<dyn Stream>, piece: &mut [u8]) -> io::Result<usize> {
    let mut full = 0;
    while full < piece.len() {
        match stream.read(&mut piece[full..]) {
            Ok(0) => break,
            Ok(count) => full += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(full)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes()[..word.len()]);
        }
    }
}

/// A checksum that depends on every bit and its place: a multiplication per word, as FNV has it for bytes. All pieces but the
/// last have to be of whole words.
#[derive(Default)]
struct Sum(u64);

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            let mut whole = [0; 8];
            whole[..word.len()].copy_from_slice(word);
            // Odd, so that no bit is lost; turned, so that high bits reach low ones.
            self.0 = (self.0 ^ u64::from_le_bytes(whole)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u64 {
        let mut sum = Sum::default();
        sum.add(bytes);
        sum.0
    }

    #[test]
    fn both_ends_say_the_same_and_a_stream_of_another_length_is_an_error() {
        let long = 3 * PIECE as u64 + 1001;
        for (sent, expected) in [(0, 0), (1, 1), (long, long), (PIECE as u64, 5), (5, PIECE as u64)] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let sender = thread::spawn(move || {
                let stream = listener.accept().unwrap().0;
                // It waits in vain for a receiver that waits for more.
                let limit = if sent < expected { Duration::from_millis(100) } else { LIMIT };
                stream.set_read_timeout(Some(limit)).unwrap();
                send(Box::new(stream), sent)
            });
            let received = receive(connect(&Address::Tcp(address)).unwrap(), expected);
            let said = sender.join().unwrap();
            if sent == expected {
                assert_eq!(received.unwrap(), said.unwrap());
            } else {
                let error = received.unwrap_err().to_string();
                assert_eq!(error, if sent < expected { "5 bytes came" } else { "more came than that" });
            }
        }
    }

    #[test]
    fn many_connections_are_open_at_once() {
        for halves in [false, true] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let mut accept: Accept = Box::new(move || Ok(Box::new(listener.accept()?.0) as _));
            let other = thread::spawn(move || echoed(&Address::Tcp(address), 10, halves));
            assert_eq!(echo(&mut accept, 10, halves).unwrap(), "connections=10");
            assert_eq!(other.join().unwrap().unwrap(), "connections=10");
        }
    }

    #[test]
    fn the_checksum_sees_a_bit_and_an_exchange() {
        let mut bytes = vec![0; 4096];
        Random(1).fill(&mut bytes);
        let whole = sum(&bytes);
        for at in [0, 7, 8, 2049, 4095] {
            for bit in [1, 0x80] {
                bytes[at] ^= bit;
                assert_ne!(sum(&bytes), whole);
                bytes[at] ^= bit;
            }
        }
        let (first, second) = bytes.split_at_mut(2048);
        first.swap_with_slice(second);
        assert_ne!(sum(&bytes), whole);
    }
}
