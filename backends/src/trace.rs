//! Spans that say what a line of the log is about, so that lines need not repeat it.
//!
//! A thread enters the span of a device where it controls the device. An I/O thread enters the span of a queue while the queue comes or
//! goes, never for a request: a line about a request names the queue's span as its parent.

use tracing::{Span, error_span};

/// The target of these spans. A filter that lets any line through must let them through, or the line does not say what it is about.
pub const TARGET: &str = "span";

/// The span of a device. It has no parent, so that a line names one device.
#[must_use]
pub fn device(name: &str) -> Span {
    error_span!(target: TARGET, parent: None, "device", %name)
}

/// The span of a queue, within that of its device.
#[must_use]
pub fn queue(device: &Span, index: u16) -> Span {
    error_span!(target: TARGET, parent: device, "queue", index)
}
