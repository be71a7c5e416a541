//! Buffers that O_DIRECT takes, for data of guests that it does not.

/// An aligned buffer that stands for the bytes of the file from an offset on.
#[derive(Debug, Default)]
pub(super) struct Bounce {
    memory: Vec<u8>,
    start: usize,
    len: usize,
    offset: u64,
}

impl Bounce {
    /// With room for `len` bytes, at a multiple of `align`.
    pub(super) fn new(len: usize, align: usize) -> Self {
        let memory = vec![0; len + align - 1];
        let start = memory.as_ptr().align_offset(align);
        Self { memory, start, len, offset: 0 }
    }

    /// Stands for the blocks from `start` to `end` from now on, with whatever is in it. There must be room for them.
    pub(super) fn stand_for(&mut self, (start, end): (u64, u64)) {
        self.offset = start;
        self.len = (end - start) as usize;
    }

    /// Where in the file it begins.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes that it stands for; zero before there is a buffer.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}
