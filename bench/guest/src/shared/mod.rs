//! Files that the harness on the host compiles too, so that both count, send and choose alike.

pub mod hist;
pub mod packet;
pub mod rng;
