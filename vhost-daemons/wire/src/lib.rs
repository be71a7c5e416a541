//! vhost-user on its socket: messages of both sides with their descriptors, each within a time limit.
//!
//! The protocol is that of QEMU's `docs/interop/vhost-user.rst`. The numbers, payloads and feature bits are those of the
//! `vhost` crate; [`message`] adds those that the crate has no names for. The code that reads and writes the socket is
//! our own ([`connection`]), because that of the crate waits without a limit and can't receive every message that
//! common peers send. The frontend in `ringvm` and the daemons both use this one. The other side is trusted by
//! neither: a [`connection::Connection`] bounds what it accepts, and [`files`] sorts descriptors as they come.

pub mod connection;
pub mod files;
pub mod message;
