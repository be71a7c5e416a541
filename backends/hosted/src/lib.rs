//! Backends that are written for the `vhost-user-backend` crate of rust-vmm, as devices of RingVM.
//!
//! Such a backend is a [`VhostUserBackend`](vhost_user_backend::VhostUserBackend): it is called for events of its queues
//! and of descriptors of its own ([`listeners`]). Its author runs it as a daemon, with the crate's server. Here it is a
//! device like any other, on threads of its own, in the VMM's process or behind our own server.

pub mod console;
pub mod hosted;
pub mod listeners;
mod serving;
mod socket_path;
pub mod vsock;

pub use hosted::{ConfigChange, Hosted, HostedError};
