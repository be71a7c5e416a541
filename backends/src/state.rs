//! A device's memory besides the positions of its queues, as bytes that travel to another device of its kind
//! (vhost-user specification, "Migrating back-end state").
//!
//! The bytes may come from anywhere. They start with the kind of device and the version; every field is checked
//! before any is applied, and nothing may be missing or left over. Numbers are little-endian.

use crate::device::DeviceError;

/// Longest state of a device in bytes.
pub const MAX_STATE: usize = 64 << 10;

/// Checks the state for a device that has none of its own.
///
/// # Errors
/// [`DeviceError::State`] for any but the empty one.
pub fn check_empty(device: &str, state: &[u8]) -> Result<(), DeviceError> {
    if state.is_empty() {
        return Ok(());
    }
    Err(DeviceError::State { device: device.to_owned(), reason: "this device has none" })
}

const MAGIC: [u8; 4] = *b"RVds";

/// Why bytes are not the state of a device.
pub(crate) type Refusal = &'static str;

/// A state that is being written.
pub(crate) struct StateWriter(Vec<u8>);

impl StateWriter {
    /// The state of a device of a virtio ID, in some version of its own layout.
    pub(crate) fn new(device_type: u32, version: u32) -> Self {
        Self([MAGIC, device_type.to_le_bytes(), version.to_le_bytes()].concat())
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    pub(crate) fn flag(&mut self, flag: bool) {
        self.put(&[flag.into()]);
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        debug_assert!(self.0.len() <= MAX_STATE, "tables are bounded");
        self.0
    }
}

/// A state that is being read.
pub(crate) struct StateReader<'a>(&'a [u8]);

impl<'a> StateReader<'a> {
    /// Checks what stands in front.
    pub(crate) fn new(state: &'a [u8], device_type: u32, version: u32) -> Result<Self, Refusal> {
        if state.len() > MAX_STATE {
            return Err("it is longer than 64 KiB");
        }
        let mut reader = Self(state);
        if reader.take()? != MAGIC {
            return Err("it is not the state of a device");
        }
        if u32::from_le_bytes(reader.take()?) != device_type {
            return Err("it is the state of another kind of device");
        }
        if u32::from_le_bytes(reader.take()?) != version {
            return Err("it has another version");
        }
        Ok(reader)
    }

    pub(crate) fn take<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or("it ends too early")?;
        self.0 = rest;
        Ok(*bytes)
    }

    pub(crate) fn flag(&mut self) -> Result<bool, Refusal> {
        match self.take()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err("a flag is neither on nor off"),
        }
    }

    /// Nothing may be left.
    pub(crate) fn finish(self) -> Result<(), Refusal> {
        if self.0.is_empty() { Ok(()) } else { Err("something follows behind its end") }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
