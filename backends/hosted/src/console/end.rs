//! Opening the host's end of a console.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use ringvm_backends::host::output_file::{self, OutputFileError};
use ringvm_backends::options::Checked;
use thiserror::Error;

use super::options::{ConsoleOptions, Kind};
use super::pty::Pty;
use super::socket::Listener;

/// Where readers come from, if they come and go.
#[derive(Debug)]
pub(super) enum Door {
    /// Nowhere: the reader is there from the start.
    None,
    Socket(Listener),
    Pty(Pty),
}

/// The host's end of a console.
#[derive(Debug)]
pub struct End {
    pub(super) input: Option<File>,
    pub(super) output: Option<File>,
    pub(super) limit: Option<u64>,
    pub(super) door: Door,
}

/// Why a console's end can't be opened.
#[derive(Debug, Error)]
#[error("console {place}: {source}")]
pub struct OpenError {
    place: String,
    source: io::Error,
}

impl End {
    /// Opens what the options name. `stdio` are descriptors 0 and 1 of the process; the mode of a terminal there is the
    /// caller's concern.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn open(options: &Checked<ConsoleOptions>) -> Result<Self, OpenError> {
        let (place, end) = match (&options.socket, &options.file, options.kind) {
            (Some(path), ..) => (path.display().to_string(), Self::socket(path)),
            (_, Some(path), _) => (path.display().to_string(), Self::file(path, options.max)),
            (_, _, Some(Kind::Pty)) => ("pty".into(), Self::pty()),
            (_, _, Some(Kind::Stdio)) => ("stdio".into(), Self::stdio()),
            _ => return Ok(Self::null()),
        };
        end.map_err(|source| OpenError { place, source })
    }

    /// Any pair of descriptors. They may be shared with other processes: their flags stay as they are.
    #[must_use]
    pub fn descriptors(input: OwnedFd, output: OwnedFd) -> Self {
        Self { input: Some(input.into()), output: Some(output.into()), ..Self::null() }
    }

    /// No input, and output is discarded.
    #[must_use]
    pub fn null() -> Self {
        Self { input: None, output: None, limit: None, door: Door::None }
    }

    /// Path of the pseudoterminal that programs open, if the end is one.
    #[must_use]
    pub fn slave(&self) -> Option<&Path> {
        match &self.door {
            Door::Pty(pty) => Some(pty.slave()),
            _ => None,
        }
    }

    fn stdio() -> io::Result<Self> {
        let input = std::io::stdin().as_fd().try_clone_to_owned()?;
        let output = std::io::stdout().as_fd().try_clone_to_owned()?;
        Ok(Self::descriptors(input, output))
    }

    fn pty() -> io::Result<Self> {
        Ok(Self { door: Door::Pty(Pty::open()?), ..Self::null() })
    }

    fn socket(path: &Path) -> io::Result<Self> {
        Ok(Self { door: Door::Socket(Listener::bind(path)?), ..Self::null() })
    }

    fn file(path: &Path, max: u64) -> io::Result<Self> {
        let output = output_file::open(path).map_err(|error| match error {
            OutputFileError::Link => io::Error::other("it is a symbolic link, name the file itself"),
            error => error.into(),
        })?;
        Ok(Self { output: Some(output.file), limit: output.stays.then_some(max), ..Self::null() })
    }
}
