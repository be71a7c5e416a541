//! Where the daemon is, and how to connect to it.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use ringvm_backends::host::bound::connect_now;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Uid, geteuid};
use tracing::warn;

pub use super::program::{INHERITED, Program};

/// A daemon to connect to, or one of our own.
#[derive(Debug)]
pub enum Peer {
    /// A daemon listens, or will, at this socket.
    Socket(Listener),
    /// A program that is started, again and again if need be, and serves its inherited socket.
    Program(Program),
}

/// A socket at which a daemon listens.
#[derive(Debug)]
pub struct Listener {
    path: PathBuf,
    /// The user who served the first connection.
    user: Option<Uid>,
}

impl From<PathBuf> for Listener {
    fn from(path: PathBuf) -> Self {
        Self { path, user: None }
    }
}

impl Listener {
    /// Connects. The daemon that answers gets the guest's memory, so it must belong to the user of the first one, or
    /// to a user who may read that memory anyway.
    fn connect(&mut self) -> io::Result<UnixStream> {
        let stream = connect_now(&self.path)?;
        let user = socket_peercred(&stream)?.uid;
        if self.user.is_none() {
            self.warn_of_others();
        }
        let first = *self.user.get_or_insert(user);
        if user != first && user != geteuid() && !user.is_root() {
            let (now, first) = (user.as_raw(), first.as_raw());
            let message =
                format!("user {now} serves it now, and user {first} did before: the guest's memory is not for others");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        Ok(stream)
    }

    /// Says so if other users could put a socket of theirs in the place of this one.
    fn warn_of_others(&self) {
        /// Write permission for others, and the bit that lets only owners remove.
        const WRITABLE: u32 = 0o022;
        const STICKY: u32 = 0o1000;
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let Ok(about) = folder.metadata() else { return };
        if about.mode() & WRITABLE != 0 && about.mode() & STICKY == 0 {
            warn!(
                "{}: other users may write to this folder, so that they can put themselves in the place of the daemon at {}; \
                 chmod go-w it",
                folder.display(),
                self.path.display()
            );
        }
    }
}

impl Peer {
    /// The daemon that listens at a socket.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self::Socket(path.into())
    }

    /// For people.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Socket(listener) => listener.path.display().to_string(),
            Self::Program(program) => program.name(),
        }
    }

    /// Connects, without waiting for a daemon to come.
    ///
    /// # Errors
    /// When no daemon is there, or the program can't be started.
    pub fn connect(&mut self) -> io::Result<UnixStream> {
        match self {
            Self::Socket(listener) => listener.connect(),
            Self::Program(program) => program.start(),
        }
    }

    /// The connection to a program is lost: it is killed, at once if it hangs, else if it does not end without help.
    pub(super) fn lost(&mut self, hangs: bool) {
        if let Self::Program(program) = self {
            program.lost(hangs);
        }
    }

    /// Kills a program that is not needed any more, and waits until it has ended, for a moment at most.
    pub(super) fn end(&mut self) {
        if let Self::Program(program) = self {
            program.kill();
        }
    }

    /// Whether something of a program that has lost its connection is left, for which the next one has to wait.
    pub(super) fn has_predecessor(&mut self) -> bool {
        match self {
            Self::Socket(_) => false,
            Self::Program(program) => program.has_predecessor(),
        }
    }

    /// The program that was started last.
    pub(super) fn program(&self) -> Option<&Program> {
        match self {
            Self::Socket(_) => None,
            Self::Program(program) => Some(program),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_listener_that_accepts_nobody_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let mut peer = Listener::from(path);
        let mut waiting = Vec::new();
        // The backlog holds a few.
        let refused = (0..1000).find_map(|_| peer.connect().map(|stream| waiting.push(stream)).err());
        assert_eq!(refused.expect("it is full some time").kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_socket_that_another_user_serves_now_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut peer = Listener::from(path);
        peer.connect().unwrap();
        assert_eq!(peer.user, Some(geteuid()));
        // As if another user's daemon had been there first: ours and root's are as good.
        peer.user = Some(Uid::from_raw(4242));
        peer.connect().unwrap();
        if !geteuid().is_root() {
            return;
        }
        // A listener of a user who is neither.
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let theirs = folder.path().join("t");
        let serve = "import os,socket,sys,time;os.setuid(4343);s=socket.socket(socket.AF_UNIX);s.bind(sys.argv[1]);\
                     s.listen();sys.stdout.write('x');sys.stdout.flush();time.sleep(60)";
        let child = std::process::Command::new("python3")
            .args(["-c", serve])
            .arg(&theirs)
            .stdout(std::process::Stdio::piped())
            .spawn();
        let Ok(mut child) = child else { return };
        let mut said = [0];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
        let mut peer = Listener::from(theirs);
        peer.user = Some(Uid::from_raw(4242));
        let error = peer.connect().unwrap_err();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("user 4343") && error.to_string().contains("user 4242"), "{error}");
    }
}
