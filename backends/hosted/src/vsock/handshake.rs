//! The line with which a program of the host says where in the guest it wants to go: `CONNECT <port>`, as for Firecracker
//! and Cloud Hypervisor.

use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

/// Longest line, with its end.
const MAX_LINE: usize = 32;

/// A client that has not said where to go.
#[derive(Debug)]
pub(super) struct Handshake {
    stream: UnixStream,
    line: Vec<u8>,
    pub(super) deadline: Instant,
}

/// What a client has said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Not all of it.
    Nothing,
    /// The guest's port.
    Port(u32),
    /// Something else, or it has gone.
    Nonsense,
}

impl Handshake {
    /// A client that has until `deadline`.
    pub(super) fn new(stream: UnixStream, deadline: Instant) -> Self {
        Self { stream, line: Vec::new(), deadline }
    }

    /// The socket, with everything in it that the client has sent after the line.
    pub(super) fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Reads the line and nothing beyond: what follows is for the guest.
    pub(super) fn read(&mut self) -> Said {
        let mut bytes = [0; MAX_LINE];
        while self.line.len() < MAX_LINE {
            let room = &mut bytes[..MAX_LINE - self.line.len()];
            let seen = match recv(&self.stream, &mut *room, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Said::Nonsense,
                Ok((seen, _)) => seen,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Said::Nothing,
                Err(_) => return Said::Nonsense,
            };
            let end = room[..seen].iter().position(|&byte| byte == b'\n');
            let take = end.map_or(seen, |end| end + 1);
            // Peeked a moment ago, and nobody else reads this socket.
            if !matches!(recv(&self.stream, &mut room[..take], RecvFlags::DONTWAIT), Ok((taken, _)) if taken == take) {
                return Said::Nonsense;
            }
            self.line.extend_from_slice(&room[..take]);
            if end.is_some() {
                return parse(&self.line).map_or(Said::Nonsense, Said::Port);
            }
        }
        Said::Nonsense
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (word, port) = (words.next()?, words.next()?);
    let is_request = word.eq_ignore_ascii_case("connect") && words.next().is_none();
    // `parse` alone would take a sign.
    (is_request && port.bytes().all(|byte| byte.is_ascii_digit())).then(|| port.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;

    fn pair() -> (UnixStream, Handshake) {
        let (client, stream) = UnixStream::pair().unwrap();
        (client, Handshake::new(stream, Instant::now() + Duration::from_secs(10)))
    }

    #[test]
    fn a_line_is_read_in_any_pieces_and_nothing_after_it() {
        for piece in [1, 2, 5, 100] {
            let (mut client, mut handshake) = pair();
            let text = b"CONNECT 4294967295\nafter";
            let mut said = Said::Nothing;
            for part in text.chunks(piece) {
                client.write_all(part).unwrap();
                if said == Said::Nothing {
                    said = handshake.read();
                }
            }
            assert_eq!(said, Said::Port(u32::MAX));
            drop(client);
            let rest = std::io::read_to_string(handshake.into_stream()).unwrap();
            assert_eq!(rest, "after");
        }
    }

    #[test]
    fn what_is_no_request_is_nonsense() {
        for line in [
            "\n",
            "CONNECT\n",
            "CONNECT x\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 4294967296\n",
            "CONNECT 1 2\n",
            "GET / HTTP/1.1\r\n",
            "CONNECT 1                              ",
            "CONNECT \u{ff}\n",
        ] {
            let (mut client, mut handshake) = pair();
            client.write_all(line.as_bytes()).unwrap();
            assert_eq!(handshake.read(), Said::Nonsense, "{line:?}");
        }
        for line in ["CONNECT 52\n", "connect 52\r\n", "  CONNECT   52  \n"] {
            let (mut client, mut handshake) = pair();
            client.write_all(line.as_bytes()).unwrap();
            assert_eq!(handshake.read(), Said::Port(52), "{line:?}");
        }
        let (client, mut handshake) = pair();
        assert_eq!(handshake.read(), Said::Nothing);
        drop(client);
        assert_eq!(handshake.read(), Said::Nonsense);
    }
}
