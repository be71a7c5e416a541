//! What the disk should hold: a word per sector that says how it was last written, and the content that follows from it.

use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::shared::rng::mix;
use crate::spec::SECTOR;

/// A sector's state.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct State(u32);

impl State {
    /// Anything may be there.
    pub const UNKNOWN: Self = Self(0);
    /// Zeroes.
    pub const ZERO: Self = Self(1);
    const FIRST_GENERATION: u32 = 2;
    const OR_ZERO: u32 = 1 << 31;

    /// Written by the write with this number.
    pub fn written(generation: u32) -> Self {
        Self(generation & !Self::OR_ZERO)
    }

    /// The same, or zeroes: what a discard leaves.
    pub fn or_zero(self) -> Self {
        if self == Self::ZERO { self } else { Self(self.0 | Self::OR_ZERO) }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0 & !Self::OR_ZERO, self.0 & Self::OR_ZERO != 0) {
            (0, _) => f.write_str("anything"),
            (1, _) => f.write_str("zeroes"),
            (generation, false) => write!(f, "generation:{generation}"),
            (generation, true) => write!(f, "generation:{generation}-or-zeroes"),
        }
    }
}

/// In the second word of each written sector: names the content as ours when it turns up in the wrong place.
const MARK: u64 = 0x5256_4d47;

/// The expected content of the first so many sectors of a disk.
pub struct Model {
    seed: u64,
    states: Vec<AtomicU32>,
    generation: AtomicU32,
}

impl Model {
    /// Nothing is known about any sector yet.
    pub fn new(sectors: u64, seed: u64) -> Self {
        Self {
            seed,
            states: (0..sectors).map(|_| AtomicU32::new(State::UNKNOWN.0)).collect(),
            generation: AtomicU32::new(State::FIRST_GENERATION),
        }
    }

    /// How many sectors it covers.
    pub fn sectors(&self) -> u64 {
        self.states.len() as u64
    }

    /// A number for a write that no other has.
    pub fn next_generation(&self) -> u32 {
        self.generation.fetch_add(1, Ordering::Relaxed)
    }

    /// How a sector was last written.
    pub fn state(&self, sector: u64) -> State {
        State(self.states[sector as usize].load(Ordering::Relaxed))
    }

    /// Notes how a sector was written.
    pub fn set(&self, sector: u64, state: State) {
        self.states[sector as usize].store(state.0, Ordering::Relaxed);
    }

    /// Makes the content of a sector.
    pub fn content(&self, sector: u64, generation: u32, data: &mut [u8]) {
        for (index, word) in data.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = self.word(sector, generation, index as u64).to_le_bytes();
        }
    }

    fn word(&self, sector: u64, generation: u32, index: u64) -> u64 {
        match index {
            0 => sector,
            1 => u64::from(generation) | MARK << 32,
            // Cheap, and different in every sector, generation and place.
            _ => mix(self.seed ^ sector << 32 ^ u64::from(generation)).wrapping_add(index.wrapping_mul(PHI)),
        }
    }

    /// Checks what was read from a sector against its state, and narrows a state that left a choice.
    ///
    /// # Errors
    /// What the data looks like instead.
    pub fn check(&self, sector: u64, data: &[u8]) -> Result<(), Found> {
        let state = self.state(sector);
        let generation = state.0 & !State::OR_ZERO;
        if generation == State::UNKNOWN.0 {
            return Ok(());
        }
        let (words, _) = data.as_chunks::<8>();
        let is_zero = || words.iter().all(|word| word == &[0; 8]);
        let base = mix(self.seed ^ sector << 32 ^ u64::from(generation));
        let is_written = || {
            words.iter().enumerate().all(|(index, word)| {
                let expected = match index as u64 {
                    index @ (0 | 1) => self.word(sector, generation, index),
                    index => base.wrapping_add(index.wrapping_mul(PHI)),
                };
                *word == expected.to_le_bytes()
            })
        };
        let choice = state.0 & State::OR_ZERO != 0;
        if (choice || state == State::ZERO) && is_zero() {
            self.set(sector, State::ZERO);
        } else if state != State::ZERO && is_written() {
            self.set(sector, State::written(generation));
        } else {
            return Err(Found::look(words, is_zero()));
        }
        Ok(())
    }
}

const PHI: u64 = 0x9e37_79b9_7f4a_7c15;
const _: () = assert!(SECTOR.is_multiple_of(8));

/// What a sector turned out to hold.
pub enum Found {
    /// Zeroes.
    Zeroes,
    /// Our content: this sector's, or another's; of this generation; perhaps damaged further on.
    Ours {
        /// The sector that it belongs to.
        sector: u64,
        /// The write that it comes from.
        generation: u32,
    },
    /// Something else: its first two words.
    Other(u64, u64),
}

impl Found {
    fn look(words: &[[u8; 8]], zero: bool) -> Self {
        let word = |index: usize| words.get(index).map_or(0, |word| u64::from_le_bytes(*word));
        match (word(0), word(1)) {
            _ if zero => Self::Zeroes,
            (sector, mark) if mark >> 32 == MARK => Self::Ours { sector, generation: mark as u32 },
            (first, second) => Self::Other(first, second),
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zeroes => f.write_str("zeroes"),
            Self::Ours { sector, generation } => write!(f, "sector:{sector},generation:{generation}"),
            Self::Other(first, second) => write!(f, "words:{first:#x},{second:#x}"),
        }
    }
}
