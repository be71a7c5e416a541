//! How a device reaches its driver: one small type, so that no layer stands between a used buffer and the guest.

use std::fmt;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// A line from a device to its driver.
#[derive(Clone)]
pub enum Interrupt {
    /// An eventfd. For MSI-X it is the irqfd itself, in a daemon the call fd of the vring: no thread stands in between.
    Event(Arc<EventFd>),
    /// A function of the transport, for what an eventfd can't say: legacy interrupts, a status bit.
    Call(Arc<dyn Fn() + Send + Sync>),
    /// Nobody listens: the driver polls.
    None,
}

impl Interrupt {
    /// Raises it. Never blocks: an eventfd whose counter is full is raised already.
    pub fn raise(&self) {
        match self {
            // The only failure is a full counter (EAGAIN), and then the reader has yet to see the edge.
            Self::Event(event) => drop(event.write(1)),
            Self::Call(call) => call(),
            Self::None => {}
        }
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Event(_) => "Interrupt::Event",
            Self::Call(_) => "Interrupt::Call",
            Self::None => "Interrupt::None",
        })
    }
}
