//! A user's description of a console: where the guest's bytes go on the host.

use std::path::PathBuf;

use ringvm_backends::options::Check;
use serde::{Deserialize, Serialize};

use crate::socket_path;

/// Most bytes of a console's file, unless the user says otherwise.
const FILE_MAX: u64 = 64 << 20;

/// A host end that needs no path.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Standard input and output of the process.
    Stdio,
    /// A pseudoterminal that is made for it.
    Pty,
    /// Output is discarded, and there is no input.
    Null,
}

ringvm_backends::options! {
    /// A console as the command line, a configuration file or a daemon's arguments describe it. One of `kind`, `socket` and
    /// `file` says where its bytes go.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct ConsoleOptions {
        /// Standard input and output, a new pseudoterminal, or nothing.
        #[key(positional, value("stdio|pty|null"))]
        pub kind: Option<Kind>,
        /// Unix socket to listen on, for one client at a time.
        #[key(value("PATH"))]
        pub socket: Option<PathBuf>,
        /// File that takes the output, emptied first; or a character device.
        #[key(value("PATH"))]
        pub file: Option<PathBuf>,
        /// Most bytes that are written to the file.
        pub max: u64 = FILE_MAX,
    }
}

impl Check for ConsoleOptions {
    fn check(&self) -> Result<(), String> {
        const ENDS: &str = "give one of stdio, pty, null, socket=PATH and file=PATH";
        let ends = [self.kind.is_some(), self.socket.is_some(), self.file.is_some()];
        match ends.iter().filter(|named| **named).count() {
            1 => {}
            0 => return Err(format!("the console has no end on the host: {ENDS}")),
            _ => return Err(format!("the console has more than one end on the host: {ENDS}")),
        }
        if let Some(path) = &self.socket {
            socket_path::check(path, 0)?;
        }
        if self.file.as_deref().is_some_and(|path| path.as_os_str().is_empty()) {
            return Err("file= is empty, give a path like console.log".into());
        }
        if self.file.is_none() && self.max != FILE_MAX {
            return Err("max= goes with file=".into());
        }
        if self.max == 0 {
            return Err("max=0 would keep nothing; use null, or a size like max=64M".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(options: ConsoleOptions) -> String {
        options.check().unwrap_err()
    }

    #[test]
    fn exactly_one_end_is_named() {
        let none = ConsoleOptions::default();
        let socket = ConsoleOptions { socket: Some("/run/c".into()), ..none.clone() };
        let file = ConsoleOptions { file: Some("c.log".into()), max: 1, ..none.clone() };
        let kinds =
            [Kind::Stdio, Kind::Pty, Kind::Null].map(|kind| ConsoleOptions { kind: Some(kind), ..none.clone() });
        for options in [&socket, &file].into_iter().chain(&kinds) {
            options.check().unwrap();
        }
        assert!(refused(none.clone()).contains("no end"));
        assert!(refused(ConsoleOptions { kind: Some(Kind::Pty), ..file.clone() }).contains("more than one"));
        assert!(refused(ConsoleOptions { socket: Some("".into()), ..none.clone() }).contains("socket= is empty"));
        let long = ConsoleOptions { socket: Some("x".repeat(108).into()), ..none.clone() };
        assert!(refused(long).contains("108 bytes"));
        assert!(refused(ConsoleOptions { file: Some("".into()), ..none }).contains("file= is empty"));
        assert!(refused(ConsoleOptions { max: 0, ..file }).contains("max=0"));
        assert!(refused(ConsoleOptions { max: 1, ..socket }).contains("goes with file="));
    }
}
