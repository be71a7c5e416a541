//! Opening the host's end of a console.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use ringvm_backends::host::output_file::{self, OutputFileError};
use ringvm_backends::options::Checked;
use rustix::termios::isatty;
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
pub enum OpenError {
    /// Another process listens at the path of its socket.
    #[error("{device}: {}: another process listens there; end it, or give another socket=", path.display())]
    InUse {
        /// Name of the console.
        device: String,
        /// The path.
        path: PathBuf,
    },
    /// The host refuses.
    #[error("{device}: {place}: {source}; {advice}")]
    Host {
        /// Name of the console.
        device: String,
        /// The end.
        place: String,
        /// The error that it returned.
        source: io::Error,
        /// What to do about it.
        advice: &'static str,
    },
}

/// An error and what to do about it.
type Refused = (io::Error, &'static str);

impl End {
    /// Opens what the options name for the console `name`. `stdio` are descriptors 0 and 1 of the process; the mode of a
    /// terminal there is the caller's concern.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn open(name: &str, options: &Checked<ConsoleOptions>) -> Result<Self, OpenError> {
        let (place, end) = match (&options.socket, &options.file, options.kind) {
            (Some(path), ..) => (path.as_path(), Self::socket(path)),
            (_, Some(path), _) => (path.as_path(), Self::file(path, options.max)),
            (_, _, Some(Kind::Pty)) => (Path::new("pty"), Self::pty()),
            (_, _, Some(Kind::Stdio)) => (Path::new("stdio"), Self::stdio()),
            _ => return Ok(Self::null()),
        };
        end.map_err(|(source, advice)| {
            let device = name.to_owned();
            match source.kind() {
                ErrorKind::AddrInUse => OpenError::InUse { device, path: place.to_owned() },
                _ => OpenError::Host { device, place: place.display().to_string(), source, advice },
            }
        })
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

    /// Whether output goes to a terminal, or will.
    pub(super) fn is_terminal(&self) -> bool {
        matches!(self.door, Door::Pty(_)) || self.output.as_ref().is_some_and(isatty)
    }

    fn stdio() -> Result<Self, Refused> {
        let dup = |file: &dyn AsFd| file.as_fd().try_clone_to_owned();
        let ends = dup(&std::io::stdin()).and_then(|input| Ok((input, dup(&std::io::stdout())?)));
        let (input, output) = ends.map_err(|source| (source, "open standard input and output"))?;
        Ok(Self::descriptors(input, output))
    }

    fn pty() -> Result<Self, Refused> {
        let pty = Pty::open().map_err(|source| (source, "give another end, such as socket="))?;
        Ok(Self { door: Door::Pty(pty), ..Self::null() })
    }

    fn socket(path: &Path) -> Result<Self, Refused> {
        let listener = Listener::bind(path).map_err(|source| (source, "give another socket="))?;
        Ok(Self { door: Door::Socket(listener), ..Self::null() })
    }

    fn file(path: &Path, max: u64) -> Result<Self, Refused> {
        let refused = |error| {
            let advice = match error {
                OutputFileError::Link => "name the file itself",
                OutputFileError::Special => "name a file or a terminal",
                OutputFileError::Open(_) => "name a file that can be written",
                OutputFileError::Empty(_) => "name a file that can be emptied",
            };
            (error.into(), advice)
        };
        let output = output_file::open(path).map_err(refused)?;
        Ok(Self { output: Some(output.file), limit: output.stays.then_some(max), ..Self::null() })
    }
}
