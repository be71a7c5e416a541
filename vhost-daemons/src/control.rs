//! A device's control thread: it serves one client after another, and tells the main thread when no more can come.

use std::io;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use ringvm_backends::device::{Device, DeviceError, Flusher};
use ringvm_backends::trace;
use ringvm_vhost_user::connection::Connection;
use tracing::{debug_span, error, info, warn};

use crate::mailbox::Mailbox;
use crate::session::{End, Session};
use crate::source::{Next, Source};

/// Between two attempts to accept, when the host has no descriptor left.
const HOST_PAUSE: Duration = Duration::from_millis(200);

/// Reports to the main thread.
pub(crate) enum Told {
    /// A signal asks for statistics.
    Statistics,
    /// A signal asks for the end.
    End,
    /// A second signal does not wait for the end to finish.
    AtOnce,
    /// This thread has panicked.
    Died(String),
    /// The control thread of this number has no more clients to serve.
    Ended(usize, Report),
    /// The device of this number was flushed without its control thread.
    Flushed(usize, Result<(), DeviceError>),
}

/// The remains of a control thread.
pub(crate) struct Report {
    /// The device, unless the thread has died.
    pub(crate) device: Option<Box<dyn Device>>,
    /// Whether nothing is in flight.
    pub(crate) idle: bool,
    pub(crate) flushed: Result<(), DeviceError>,
}

/// A device and the thread that controls it.
pub(crate) struct Control {
    pub(crate) name: String,
    pub(crate) mailbox: Arc<Mailbox>,
    /// For when the thread does not come to its end.
    pub(crate) flusher: Option<Flusher>,
    pub(crate) report: Option<Report>,
}

impl Control {
    pub(crate) fn start(
        mut device: Box<dyn Device>,
        mut source: Source,
        tell: impl FnOnce(Report) + Send + 'static,
        grace: Duration,
    ) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let (name, flusher) = (device.info().name.clone(), Some(device.flusher()));
        let theirs = Arc::clone(&mailbox);
        let span = trace::device(&name);
        std::thread::Builder::new().name(name.clone()).spawn(move || {
            let _device = span.entered();
            let served = catch_unwind(AssertUnwindSafe(|| serve_clients(device.as_mut(), &mut source, &theirs, grace)));
            // Stop listening: no client may connect to a device that is no longer served.
            drop(source);
            let flushed = debug_span!("flush").in_scope(|| device.flush());
            let (idle, device) = match served {
                Ok(idle) => (idle, Some(device)),
                Err(_) => {
                    // Waits for requests in flight.
                    drop(device);
                    (true, None)
                }
            };
            tell(Report { device, idle, flushed });
        })?;
        Ok(Self { name, mailbox, flusher, report: None })
    }
}

/// Serves one client after another. Returns whether nothing is in flight in the end.
fn serve_clients(device: &mut dyn Device, source: &mut Source, mailbox: &Mailbox, grace: Duration) -> bool {
    let mut idle = true;
    while !mailbox.stopped() {
        match source.next(mailbox) {
            Ok(Next::Client(stream)) => idle = serve_client(device, stream, mailbox, grace),
            Ok(Next::Mail) => mailbox.serve(device),
            Ok(Next::End) => break,
            Err(error) => {
                error!(%error, "accepting a client");
                std::thread::sleep(HOST_PAUSE);
            }
        }
    }
    idle
}

/// Serves a client until it has gone, and all that it asked for has ended. Returns whether it has.
fn serve_client(device: &mut dyn Device, stream: UnixStream, mailbox: &Mailbox, grace: Duration) -> bool {
    info!("a client has connected");
    let session = stream.try_clone().and_then(|peer| {
        mailbox.serves(Some(peer));
        Session::new(device, Connection::new(stream), mailbox)
    });
    let mut session = match session {
        Ok(session) => session,
        Err(error) => {
            mailbox.serves(None);
            warn!("dropping the client: making a descriptor: {error}");
            return true;
        }
    };
    let result = session.run();
    mailbox.serves(None);
    match result {
        // An error caused by the end of the daemon is not the client's fault.
        _ if mailbox.stopped() => {}
        Ok(End::Disconnected) => info!("the client has gone"),
        Ok(End::Stopped) => {}
        Err(error) => warn!("dropping the client: {error}"),
    }
    debug_span!("end").in_scope(|| session.end(grace))
}
