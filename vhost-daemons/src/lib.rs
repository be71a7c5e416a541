//! RingVM's devices served over vhost-user: the other place that a [`Device`](ringvm_backends::device::Device) can
//! run in.
//!
//! [`serve`] gives each device a `control` thread of its own, which takes one client after another from a `source`
//! and runs a `session` with each. Messages come in, and a `backend` turns them into calls of the device:
//! `memory` maps the client's memory, a `vring` collects the settings of one ring until it can run, `inflight` keeps
//! the requests that survive a crash, `dirty` knows where written pages are logged, `state` carries the device's
//! memory of its driver. Requests themselves are the business of the backends and never come here.
//!
//! The protocol is that of QEMU's `docs/interop/vhost-user.rst`, and the wire is `ringvm-vhost-user`'s, which the
//! frontend in `ringvm` uses as well. Message types are those of the `vhost` crate, but not its request handler: that
//! refuses messages that common clients send (padded payloads, rings enabled before features are set, device status),
//! and keeps the data needed to answer for it to itself.

mod backend;
mod backend_channel;
mod control;
mod descriptor;
mod dirty;
mod ending;
pub mod exit;
mod inflight;
mod mailbox;
mod memory;
mod nic;
mod notify;
pub mod options;
mod serve;
mod session;
mod sigbus;
mod source;
mod state;
mod vring;

pub use serve::{Open, Program, serve};
