//! How a device reaches its driver: one small type, so that no layer stands between a used buffer and the guest.

use std::fmt;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::host::event::SharedEvent;

/// A line from a device to its driver.
#[derive(Clone, Default)]
pub enum Interrupt {
    /// A non-blocking eventfd that no other process has. For MSI-X it is the irqfd itself: no thread stands in
    /// between.
    Event(Arc<EventFd>),
    /// An event that another process has as well, such as the call descriptor of a vring.
    Shared(Arc<SharedEvent>),
    /// A function of the transport, for what an eventfd can't say: legacy interrupts, a status bit.
    Call(Arc<dyn Fn() + Send + Sync>),
    /// No listener: the driver polls.
    #[default]
    None,
}

impl Interrupt {
    /// Raises it. Never blocks, whatever another process has made of what it shares.
    pub fn raise(&self) {
        match self {
            // The only failure is a full counter (EAGAIN), and then the reader has yet to see the edge.
            Self::Event(event) => drop(event.write(1)),
            Self::Shared(event) => event.raise(),
            Self::Call(call) => call(),
            Self::None => {}
        }
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Event(_) => "Interrupt::Event",
            Self::Shared(_) => "Interrupt::Shared",
            Self::Call(_) => "Interrupt::Call",
            Self::None => "Interrupt::None",
        })
    }
}
