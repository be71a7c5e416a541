//! What the host shares with other processes or passes from one to the next: events, pipes, memory, sockets and inherited
//! descriptors.

pub mod bound;
pub mod event;
pub mod inherited;
pub mod pipe;
pub(crate) mod retry;
pub mod shared;
