//! Streams random data over one TCP connection and says at both ends how much it was and what its checksum is. The lab's
//! guests run emulated: the generator and the checksum take a few instructions for eight bytes, so that the network is
//! what is measured. Every wait has a limit.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::rand::{GetRandomFlags, getrandom};

const USAGE: &str = "usage: lab-stream listen|connect ADDRESS:PORT send|receive BYTES";
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

fn run(words: &[String]) -> io::Result<String> {
    let usage = || io::Error::new(io::ErrorKind::InvalidInput, USAGE);
    let [side, address, direction, bytes] = words else { return Err(usage()) };
    let (address, bytes) = (address.parse().map_err(|_| usage())?, bytes.parse().map_err(|_| usage())?);
    let stream = match side.as_str() {
        "listen" => listen(address)?,
        "connect" => connect(address)?,
        _ => return Err(usage()),
    };
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let begun = Instant::now();
    let (bytes, sum) = match direction.as_str() {
        "send" => send(stream, bytes)?,
        "receive" => receive(stream, bytes)?,
        _ => return Err(usage()),
    };
    let milliseconds = begun.elapsed().as_millis();
    Ok(format!("bytes={bytes} sum={sum:016x} milliseconds={milliseconds}"))
}

fn listen(address: SocketAddr) -> io::Result<TcpStream> {
    let listener = TcpListener::bind(address)?;
    let limit = Timespec { tv_sec: LIMIT.as_secs().cast_signed(), tv_nsec: 0 };
    if poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&limit))? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody connects"));
    }
    Ok(listener.accept()?.0)
}

/// Connects to a listener that may come later than this.
fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let begun = Instant::now();
    loop {
        match TcpStream::connect_timeout(&address, LIMIT) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused && begun.elapsed() < LIMIT => {
                thread::sleep(Duration::from_millis(100));
            }
            done => return done,
        }
    }
}

fn send(mut stream: TcpStream, bytes: u64) -> io::Result<(u64, u64)> {
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
    Ok((sent, sum.0))
}

/// Takes what comes up to the end of the stream, which has to be after so many bytes.
fn receive(mut stream: TcpStream, bytes: u64) -> io::Result<(u64, u64)> {
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
fn fill(stream: &mut TcpStream, piece: &mut [u8]) -> io::Result<usize> {
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
            let sender = thread::spawn(move || send(listener.accept().unwrap().0, sent));
            let received = receive(connect(address).unwrap(), expected);
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
