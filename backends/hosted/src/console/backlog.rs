//! Output of the guest's that waits for its reader, of bounded size.

use std::collections::VecDeque;

/// Most bytes that wait.
pub(super) const CAPACITY: usize = 64 << 10;

/// The newest output that nobody has read.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: VecDeque<u8>,
    /// Bytes that were dropped since the last [`Self::take_dropped`].
    dropped: u64,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// How many bytes it takes without dropping others.
    pub(super) fn room(&self) -> usize {
        CAPACITY - self.bytes.len()
    }

    /// Adds bytes. The oldest make room for them if there is none.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let newest = &bytes[bytes.len().saturating_sub(CAPACITY)..];
        let excess = (self.bytes.len() + newest.len()).saturating_sub(CAPACITY);
        self.bytes.drain(..excess);
        self.dropped += (bytes.len() - newest.len() + excess) as u64;
        self.bytes.extend(newest);
    }

    /// The oldest bytes, as many as lie together.
    pub(super) fn front(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    /// Removes the oldest bytes, which were read.
    pub(super) fn consume(&mut self, count: usize) {
        self.bytes.drain(..count.min(self.bytes.len()));
    }

    /// Drops everything, because no reader will come.
    pub(super) fn clear(&mut self) {
        self.bytes = VecDeque::new();
    }

    /// Notes that bytes were dropped before they came here.
    pub(super) fn note_dropped(&mut self, count: u64) {
        self.dropped += count;
    }

    /// Whether bytes were dropped that nobody was told of.
    pub(super) fn has_dropped(&self) -> bool {
        self.dropped > 0
    }

    /// The number of bytes dropped, to tell somebody.
    pub(super) fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(backlog: &mut Backlog) -> Vec<u8> {
        let mut all = Vec::new();
        while !backlog.is_empty() {
            let front = backlog.front().to_vec();
            backlog.consume(front.len());
            all.extend(front);
        }
        all
    }

    #[test]
    fn the_newest_bytes_stay() {
        let text: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
        for piece in [1, 7, 4096, 65_535, 65_536, 65_537, 200_000] {
            let mut backlog = Backlog::default();
            text.chunks(piece).for_each(|piece| backlog.push(piece));
            assert_eq!(backlog.room(), 0);
            assert_eq!(backlog.take_dropped(), (text.len() - CAPACITY) as u64);
            assert!(!backlog.has_dropped());
            assert!(all(&mut backlog) == text[text.len() - CAPACITY..], "pieces of {piece}");
            assert_eq!(backlog.room(), CAPACITY);
        }
    }
}
