//! Streams random data over one connection (TCP, a Unix socket, a vsock) and says at both ends how much it was and what its
//! checksum is; or says a text and waits for another. The lab's guests run emulated: the generator and the checksum take a few instructions for eight bytes, so that the network is
//! what is measured. Every wait has a limit.

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
       lab-stream talk ADDRESS TEXT ANSWER
An ADDRESS is IP:PORT, unix:PATH, vsock:CID:PORT or, to connect to a guest's port, hybrid:PATH:PORT";
/// For the other side to come, and between two pieces of data.
const LIMIT: Duration = Duration::from_secs(60);
const PIECE: usize = 256 << 10;

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
trait Stream: Read + Write {
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
    let [side, address, direction, bytes] = words else { return Err(usage()) };
    let address = Address::parse(address).ok_or_else(usage)?;
    if side == "talk" {
        return talk(connect(&address)?, direction, bytes);
    }
    let bytes = bytes.parse().map_err(|_| usage())?;
    let stream = match side.as_str() {
        "listen" => listen(&address)?,
        "connect" => connect(&address)?,
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

/// Says a line, and shows what comes up to a text.
fn talk(mut stream: Box<dyn Stream>, text: &str, answer: &str) -> io::Result<String> {
    stream.limit()?;
    stream.write_all(text.as_bytes())?;
    stream.write_all(b"\n")?;
    let mut heard = Vec::new();
    while !String::from_utf8_lossy(&heard).contains(answer) {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        heard.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&heard).into_owned())
}

fn listen(address: &Address) -> io::Result<Box<dyn Stream>> {
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
            wait(&listener)?;
            Box::new(listener.accept()?.0)
        }
        Address::Unix(path) => {
            let listener = UnixListener::bind(path)?;
            wait(&listener)?;
            Box::new(listener.accept()?.0)
        }
        Address::Vsock(cid, port) => {
            let listener = VsockListener::bind_with_cid_port(*cid, *port)?;
            wait(&listener)?;
            Box::new(listener.accept()?.0)
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
    // The other side closes once it has all of it: what is under way is not cut off.
    stream.finish()?;
    fill(&mut stream, &mut [0])?;
    Ok((sent, sum.0))
}

/// Takes what comes up to the end of the stream, which has to be after so many bytes.
fn receive(mut stream: Box<dyn Stream>, bytes: u64) -> io::Result<(u64, u64)> {
    let (mut sum, mut received, mut piece) = (Sum::default(), 0, vec![0; PIECE]);
    loop {
        let count = fill(&mut stream, &mut piece)?;
        sum.add(&piece[..count]);
        received += count as u64;
        if count < PIECE || received > bytes {
            break;
        }
    }
    if received == bytes {
        Ok((received, sum.0))
    } else {
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{received} bytes came")))
    }
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
    fn both_ends_say_the_same_and_a_shorter_stream_is_told() {
        for (sent, expected) in [(0, 0), (1, 1), (3 * PIECE as u64 + 1001, 3 * PIECE as u64 + 1001), (PIECE as u64, 5)]
        {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let sender = thread::spawn(move || send(Box::new(listener.accept().unwrap().0), sent));
            let received = receive(connect(&Address::Tcp(address)).unwrap(), expected);
            let said = sender.join().unwrap();
            if sent == expected {
                assert_eq!(received.unwrap(), said.unwrap());
            } else {
                assert!(received.unwrap_err().to_string().contains("262144 bytes came"));
            }
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
