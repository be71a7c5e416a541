//! The console as a device of ours.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::{CONFIG_LEN, ConsoleBackend, End};
use crate::hosted::{Hosted, HostedError};

impl ConsoleBackend {
    /// A device over a console with this end on the host, and the console itself, for its owner to say that the terminal
    /// has another size ([`Self::update_size`]). The thread of the device serves the end, too.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn host(name: &str, end: End) -> Result<(Hosted<Arc<Self>>, Arc<Self>), HostedError> {
        let failed = |what| move |source| HostedError::Host { device: name.to_owned(), what, source };
        let console = Arc::new(Self::new(name, end).map_err(failed("making its console"))?);
        let device = Hosted::new(name, VIRTIO_ID_CONSOLE, CONFIG_LEN as u32, Arc::clone(&console))?;
        // The first: the console was just made.
        let _ = console.changed.set(device.config_change());
        for listeners in device.listeners() {
            console.listen(listeners).map_err(failed("listening to its console"))?;
        }
        Ok((device, console))
    }
}
