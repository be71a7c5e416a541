//! Storage that keeps nothing: every request succeeds at once and reads leave the guest's buffer unchanged. For
//! measuring the cost of the layers above.

use std::io;

use super::{Geometry, Progress, Storage};
use crate::io::ops::Io;
use crate::virtqueue::buffers::GuestIo;

/// A disk of the given geometry without contents.
#[derive(Clone, Copy, Debug)]
pub struct Null(pub Geometry);

impl Null {
    fn done(&self, offset: u64, len: u64) -> Progress {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.0.capacity);
        Progress::Done(if fits { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) })
    }
}

impl Storage for Null {
    type Op = ();

    fn geometry(&self) -> &Geometry {
        &self.0
    }

    fn read(&mut self, (): &mut (), offset: u64, data: &mut GuestIo, _: &mut Io<'_>) -> Progress {
        self.done(offset, data.len())
    }

    fn write(&mut self, (): &mut (), offset: u64, data: &mut GuestIo, _: bool, _: &mut Io<'_>) -> Progress {
        self.done(offset, data.len())
    }

    fn flush(&mut self, (): &mut (), _: &mut Io<'_>) -> Progress {
        Progress::Done(Ok(()))
    }

    fn discard(&mut self, (): &mut (), offset: u64, len: u64, _: bool, _: &mut Io<'_>) -> Progress {
        self.done(offset, len)
    }

    fn write_zeroes(&mut self, (): &mut (), offset: u64, len: u64, _: bool, _: bool, _: &mut Io<'_>) -> Progress {
        self.done(offset, len)
    }

    fn resume(&mut self, (): &mut (), _: &mut GuestIo, _: i32, _: &mut Io<'_>) -> Progress {
        Progress::Done(Err(io::Error::other("null storage has nothing to resume")))
    }
}
