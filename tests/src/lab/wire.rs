//! The protocol between the harness and its agent in L1, over a virtio-serial port: frames of a length (u32), a kind (u8),
//! a process number (u32), little endian, and a payload.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// No frame is longer; more means that the two sides lost each other.
const MAX_FRAME: u32 = 1 << 20;

/// What both sides say. The number is the harness's name for a process.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// Harness: run this.
    Start(u32, Start),
    /// Harness: bytes for its stdin; none closes it.
    Stdin(u32, Vec<u8>),
    /// Harness: send this signal to the process alone.
    Signal(u32, i32),
    /// Harness: kill the process and its whole group.
    Kill(u32),
    /// Either: are you there / I am. The agent sends the first one when it starts.
    Ping(u32),
    /// Agent: it runs, with this process id.
    Started(u32, i32),
    /// Agent: bytes of its stdout.
    Stdout(u32, Vec<u8>),
    /// Agent: bytes of its stderr.
    Stderr(u32, Vec<u8>),
    /// Agent: it has ended, and all its output was sent.
    Exited(u32, Exit),
}

/// A process to be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Program and arguments.
    pub argv: Vec<String>,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It could not be started at all.
    Unstarted(String),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "code {code}"),
            Exit::Signal(signal) => write!(f, "signal {signal}"),
            Exit::Unstarted(why) => write!(f, "not started: {why}"),
        }
    }
}

impl Frame {
    /// Writes the frame whole and flushes it.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, id, payload) = match self {
            Frame::Start(id, start) => (1, id, serde_json::to_vec(start)?),
            Frame::Stdin(id, bytes) => (2, id, bytes.clone()),
            Frame::Signal(id, signal) => (3, id, signal.to_le_bytes().to_vec()),
            Frame::Kill(id) => (4, id, Vec::new()),
            Frame::Ping(id) => (5, id, Vec::new()),
            Frame::Started(id, pid) => (6, id, pid.to_le_bytes().to_vec()),
            Frame::Stdout(id, bytes) => (7, id, bytes.clone()),
            Frame::Stderr(id, bytes) => (8, id, bytes.clone()),
            Frame::Exited(id, exit) => (9, id, serde_json::to_vec(exit)?),
        };
        let length = u32::try_from(payload.len()).ok().filter(|&l| l <= MAX_FRAME);
        let length = length.ok_or_else(|| io::Error::other("a frame of more than 1 MiB"))?;
        let mut bytes = Vec::with_capacity(9 + payload.len());
        bytes.extend(length.to_le_bytes());
        bytes.push(kind);
        bytes.extend(id.to_le_bytes());
        bytes.extend(payload);
        to.write_all(&bytes)?;
        to.flush()
    }

    /// Reads the next frame.
    pub fn read(from: &mut impl Read) -> io::Result<Frame> {
        let mut head = [0; 9];
        from.read_exact(&mut head)?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (length, kind, id) = (word(0), head[4], word(5));
        if length > MAX_FRAME {
            return Err(io::Error::other(format!("a frame of {length} bytes")));
        }
        let mut payload = vec![0; length as usize];
        from.read_exact(&mut payload)?;
        let number = |bytes: &[u8]| {
            bytes.try_into().map(i32::from_le_bytes).map_err(|_| io::Error::other("a number that is not four bytes"))
        };
        Ok(match kind {
            1 => Frame::Start(id, serde_json::from_slice(&payload)?),
            2 => Frame::Stdin(id, payload),
            3 => Frame::Signal(id, number(&payload)?),
            4 => Frame::Kill(id),
            5 => Frame::Ping(id),
            6 => Frame::Started(id, number(&payload)?),
            7 => Frame::Stdout(id, payload),
            8 => Frame::Stderr(id, payload),
            9 => Frame::Exited(id, serde_json::from_slice(&payload)?),
            other => return Err(io::Error::other(format!("a frame of unknown kind {other}"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_survives_the_wire() {
        let frames = [
            Frame::Start(1, Start { argv: vec!["sh".into(), "-c".into(), "echo 'ä'".into()] }),
            Frame::Stdin(2, vec![0, 1, 255]),
            Frame::Signal(3, -9),
            Frame::Kill(4),
            Frame::Ping(u32::MAX),
            Frame::Started(6, 4711),
            Frame::Stdout(7, vec![]),
            Frame::Stderr(8, b"no".to_vec()),
            Frame::Exited(9, Exit::Signal(9)),
        ];
        let mut wire = Vec::new();
        for frame in &frames {
            frame.write(&mut wire).unwrap();
        }
        let mut from = wire.as_slice();
        for frame in &frames {
            assert_eq!(&Frame::read(&mut from).unwrap(), frame);
        }
        assert!(Frame::read(&mut from).is_err());
    }

    #[test]
    fn a_lost_stream_is_an_error_not_a_huge_allocation() {
        assert!(Frame::read(&mut [0xff; 16].as_slice()).is_err());
        assert!(Frame::read(&mut [0, 0, 0, 0, 99, 0, 0, 0, 0].as_slice()).is_err());
    }
}
