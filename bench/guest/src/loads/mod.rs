//! Jobs that measure, or move data as fast as they can.

pub mod exchange;
pub mod flood;
pub mod idle;
pub mod load;
