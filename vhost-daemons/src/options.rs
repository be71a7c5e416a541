//! The options that every daemon has.

use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use ringvm_backends::host::inherited;
use ringvm_backends::io::reactor::ReactorOptions;
use ringvm_backends::options::Check;
use ringvm_cli::io_options::IoOptions;
use ringvm_cli::keyval::parse_size;

use crate::source::{Peers, Source, SourceError};

/// The first descriptor that a service manager passes (`sd_listen_fds(3)`).
const LISTEN_FDS_START: RawFd = 3;

/// The time within which a daemon ends, unless it is told otherwise.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Default access mode of a socket: processes of the daemon's user may connect.
const SOCKET_MODE: u32 = 0o600;

/// How devices are served.
#[derive(Args, Clone, Debug, Default)]
pub struct ServeOptions {
    /// Listen on this Unix socket; the nth socket serves the nth device
    #[arg(long, value_name = "PATH")]
    pub socket: Vec<PathBuf>,
    /// Serve this inherited socket, listening or connected, instead; a connected one is served once
    #[arg(long, value_name = "N", conflicts_with = "socket")]
    pub fd: Vec<RawFd>,
    /// Keep this inherited descriptor open until nothing is in flight in the kernel any more, also when this process is killed
    /// (its other end, say of a pipe, tells whoever starts the next one)
    #[arg(long, value_name = "N")]
    pub sentinel_fd: Option<RawFd>,
    /// Connect to the sockets, on which frontends listen, instead of listening on them
    #[arg(long, requires = "socket")]
    pub client: bool,
    /// Rights to connect to the sockets that are made, as of chmod(1) [default: 0600]. Whoever connects must also be root, of the
    /// daemon's user or of one that --peer-uid names
    #[arg(long, value_name = "MODE", value_parser = octal)]
    pub socket_mode: Option<u32>,
    /// Let processes of this user be the other end too, e.g. a QEMU that runs as one of its own
    #[arg(long, value_name = "UID")]
    pub peer_uid: Vec<u32>,
    /// Name of the nth device in logs and statistics
    #[arg(long, value_name = "NAME")]
    pub name: Vec<String>,
    /// The I/O threads.
    #[command(flatten)]
    pub io: IoOptions,
    /// Have the kernel hold the clients' memory for I/O (registered buffers), up to SIZE bytes of all clients together
    /// [default: a quarter of the host's memory]. What is held is allocated and locked, whether or not the client had it
    /// allocated; not for clients that give memory back while they run (balloon, free page reporting, virtio-mem, postcopy):
    /// I/O would go to what was given back
    #[arg(long, value_name = "SIZE", num_args = 0..=1, require_equals = true, value_parser = parse_size)]
    pub hold_memory: Option<Option<u64>>,
    /// Print the statistics of every device on standard error at exit (SIGUSR1 prints them at any time)
    #[arg(long)]
    pub stats: bool,
    /// Longest time in seconds that the daemon takes to end [default: 5]. Requests in flight are cancelled and devices flushed;
    /// what is not through by then is given up
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub stop_timeout: Option<u64>,
    /// Say more on standard error: -v what happens, -vv how. RUST_LOG overrides it
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

impl ServeOptions {
    /// Takes the sockets that this process was started with.
    pub(crate) fn inherit(&self, devices: usize) -> Result<Vec<Source>, String> {
        let activated = if self.socket.is_empty() && self.fd.is_empty() { activated() } else { Vec::new() };
        let fds = if self.fd.is_empty() { &activated } else { &self.fd };
        let count = self.socket.len() + fds.len();
        if count == 0 {
            return Err("nobody could connect: name a --socket PATH for each device".into());
        }
        if count != devices {
            return Err(format!("{count} sockets for {devices} devices, each device needs one"));
        }
        if let Some((_, fd)) = fds.iter().enumerate().find(|(index, fd)| fds[..*index].contains(fd)) {
            return Err(format!("--fd {fd} is given twice"));
        }
        let sources = fds.iter().map(|fd| Source::inherited(*fd, self.peers())).collect::<Result<_, SourceError>>();
        sources.map_err(|error| error.to_string())
    }

    /// Takes the descriptor that outlives this process in the kernel.
    pub(crate) fn inherit_sentinel(&self) -> Result<Option<Arc<OwnedFd>>, String> {
        let Some(fd) = self.sentinel_fd else { return Ok(None) };
        if self.fd.contains(&fd) {
            return Err(format!("--sentinel-fd {fd} is a socket already"));
        }
        let taken = inherited::take(fd).map_err(|error| format!("--sentinel-fd {fd}: {error}"))?;
        Ok(Some(Arc::new(taken)))
    }

    /// Where clients come from: what was inherited, or the sockets that are named.
    pub(crate) fn open_sources(&self, inherited: Vec<Source>) -> Result<Vec<Source>, String> {
        let mode = self.socket_mode.unwrap_or(SOCKET_MODE);
        let open = |path: &PathBuf| match self.client {
            true => Ok(Source::Connect { path: path.clone(), peers: self.peers() }),
            false => Source::listen(path, mode, self.peers()),
        };
        let sources = self.socket.iter().map(open).collect::<Result<Vec<_>, SourceError>>();
        sources.map(|named| named.into_iter().chain(inherited).collect()).map_err(|error| error.to_string())
    }

    fn peers(&self) -> Peers {
        Peers(self.peer_uid.clone())
    }

    /// Longest time that the end may take.
    pub(crate) fn stop_timeout(&self) -> Duration {
        self.stop_timeout.map_or(STOP_TIMEOUT, Duration::from_secs)
    }

    /// The name of a device.
    pub(crate) fn device_name(&self, kind: &str, index: usize) -> String {
        self.name.get(index).cloned().unwrap_or_else(|| format!("{kind}{index}"))
    }

    /// The I/O threads for so many queues.
    pub(crate) fn reactor_options(&self, queues: usize) -> Result<ReactorOptions, String> {
        self.io.check()?;
        Ok(self.io.reactors(queues, self.hold_memory.map_or(0, |size| size.unwrap_or_else(quarter_of_memory))))
    }
}

/// A quarter of the host's memory in bytes.
fn quarter_of_memory() -> u64 {
    let host = rustix::system::sysinfo();
    host.totalram as u64 * u64::from(host.mem_unit) / 4
}

/// The sockets of systemd's socket activation.
fn activated() -> Vec<RawFd> {
    let number = |name| std::env::var(name).ok().and_then(|text: String| text.parse::<u32>().ok());
    let is_ours = number("LISTEN_PID") == Some(std::process::id());
    let count = number("LISTEN_FDS").filter(|_| is_ours).unwrap_or(0).min(1024);
    (LISTEN_FDS_START..).take(count as usize).collect()
}

/// The mode of a socket.
fn octal(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| "it is no octal number up to 777".to_owned())
}
