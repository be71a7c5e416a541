//! The I/O threads: their reactor, the data ring that each has, and the loops that serve a queue there.
//!
//! [`reactor`] calls a task a turn at a time. A queue is such a task: a [`worker`] if its chains are requests, a
//! [`receiver`] if they wait for frames. Both have a [`service`], and push operations into the [`ring`], a request
//! through [`ops`]. What is not a queue runs as async code beside them, see [`tasks`].

pub mod ops;
pub mod queues;
pub mod reactor;
pub mod receiver;
pub mod ring;
pub mod service;
pub mod tasks;
pub mod worker;
