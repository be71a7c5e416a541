//! Rigs for tests and benchmarks: a driver's side of a ring, a disk over nothing, a reactor that is turned by hand.
//! Not part of any program; the feature `testing` has them built.

pub mod driver;
pub mod replay;
pub mod stepped;
