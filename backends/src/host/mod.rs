//! Host resources that are shared with other processes or passed from one to the next: events, pipes, memory, sockets,
//! files for output and inherited descriptors.

pub mod bound;
pub mod event;
pub mod inherited;
pub mod output_file;
pub mod pipe;
pub(crate) mod retry;
pub mod shared;
