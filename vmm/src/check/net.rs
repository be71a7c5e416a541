//! The host's support for NICs: the tun driver, the rights to it, and the features of its taps
//! (Documentation/networking/tuntap.rst). The check makes a tap in a network namespace of its own, where no other
//! process sees it.
#![allow(unsafe_code, reason = "a thread leaves the network of its process; the safe wrapper of that is deprecated")]

use std::fs::OpenOptions;
use std::io;
use std::thread;

use ringvm_backends::net::port::tap::{Tap, TapError};
use ringvm_backends::net::port::{Offloads, Port};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, unshare_unsafe};

use super::{Finding, Level};

/// The tap that is made; its network has no other.
const NAME: &str = "check0";
const WHAT: &str = "tap";

/// Features of the host's taps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Features {
    multi_queue: bool,
    offloads: Offloads,
}

/// Why that was not found out.
#[derive(Debug)]
enum Unknown {
    /// This process may not make a network of its own.
    Network(io::Error),
    /// There is no tap of the kind that is needed.
    Tap(TapError),
    /// There is no thread to try it in.
    Thread(io::Error),
}

/// Looks at the driver, the rights and the features.
pub(super) fn net() -> Vec<Finding> {
    let driver = driver();
    if driver.level != Level::Good {
        return vec![driver];
    }
    let rights = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN));
    vec![driver, creation(rights), features(&probe())]
}

fn driver() -> Finding {
    match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Finding::good(WHAT, "/dev/net/tun opens"),
        Err(error) => {
            let advice = match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                    "only for --net tap=: load the tun module (modprobe tun), or let the container have /dev/net/tun"
                }
                _ => "only for --net tap=: run as a user who may open it, or pass open descriptors with fds=",
            };
            Finding::bad(Level::Limited, WHAT, format!("opening /dev/net/tun: {error}"), advice)
        }
    }
}

fn creation(rights: bool) -> Finding {
    if rights {
        return Finding::good("tap rights", "this user may create taps (CAP_NET_ADMIN)");
    }
    let advice = "as root, make those it is to use: ip tuntap add NAME mode tap user USER vnet_hdr multi_queue";
    Finding::bad(Level::Limited, "tap rights", "this user may not create taps, CAP_NET_ADMIN is missing", advice)
}

fn features(probed: &Result<Features, Unknown>) -> Finding {
    let what = "tap features";
    let limited = |text: String, advice: &str| Finding::bad(Level::Limited, what, text, advice);
    let Features { multi_queue, offloads } = match probed {
        Ok(features) => *features,
        Err(Unknown::Network(error)) => {
            return limited(format!("not tried, for want of a network to try them in: {error}"), "run this as root");
        }
        Err(Unknown::Tap(error)) => return limited(error.to_string(), "a tap with vnet headers is needed: see above"),
        Err(Unknown::Thread(error)) => return limited(format!("not tried: starting a thread: {error}"), "ulimit -u"),
    };
    let all = [
        ("vnet headers", true),
        ("multi-queue", multi_queue),
        ("checksums", offloads.csum),
        ("TSO4", offloads.tso4),
        ("TSO6", offloads.tso6),
        ("ECN", offloads.ecn),
        ("USO", offloads.uso4 && offloads.uso6),
    ];
    let those = |there: bool| {
        let names = all.iter().filter(|(_, is)| *is == there).map(|(name, _)| *name);
        names.collect::<Vec<_>>().join(", ")
    };
    let missing = those(false);
    if missing.is_empty() {
        return Finding::good(what, those(true));
    }
    let advice = match (multi_queue, offloads.csum) {
        (false, _) => "only queues=1 works: Linux 3.8 or later has multi-queue taps",
        (true, false) => "guests do this work themselves, at a fraction of the speed",
        (true, true) => "guests cut such packets themselves; Linux 6.2 or later has USO",
    };
    limited(format!("{}; missing: {missing}", those(true)), advice)
}

/// Makes a tap in a network of its own and asks it.
fn probe() -> Result<Features, Unknown> {
    let probing = thread::Builder::new().name("check-net".into()).spawn(|| {
        // SAFETY: only the network namespace of this thread changes; no other code's memory or descriptors depend on
        // it.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(|error| Unknown::Network(error.into()))?;
        let open = |pairs| Tap::open(NAME, pairs, None).map(|tap| tap.offloads());
        match open(2) {
            Ok(offloads) => Ok(Features { multi_queue: true, offloads }),
            // Any other fault shows with a single queue too, and is reported for that.
            Err(_) => open(1).map(|offloads| Features { multi_queue: false, offloads }).map_err(Unknown::Tap),
        }
    });
    let ended = probing.map_err(Unknown::Thread)?.join();
    ended.unwrap_or_else(|_| Err(Unknown::Thread(io::Error::other("it panicked"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(multi_queue: bool, offloads: Offloads) -> (Level, String) {
        let finding = features(&Ok(Features { multi_queue, offloads }));
        (finding.level, format!("{} / {}", finding.text, finding.advice.unwrap_or_default()))
    }

    #[test]
    fn what_is_missing_is_named() {
        let (level, text) = said(true, Offloads::ALL);
        assert_eq!(
            (level, text.as_str()),
            (Level::Good, "vnet headers, multi-queue, checksums, TSO4, TSO6, ECN, USO / ")
        );
        let (level, text) = said(true, Offloads { uso4: false, uso6: false, ..Offloads::ALL });
        assert!(level == Level::Limited && text.contains("missing: USO /") && text.contains("6.2"), "{text}");
        let (level, text) = said(false, Offloads::ALL);
        assert!(level == Level::Limited && text.contains("missing: multi-queue /"), "{text}");
        let (_, text) = said(true, Offloads::default());
        assert!(text.contains("missing: checksums, TSO4, TSO6, ECN, USO /"), "{text}");
    }

    #[test]
    fn what_was_not_tried_is_said() {
        let finding = features(&Err(Unknown::Network(io::ErrorKind::PermissionDenied.into())));
        assert!(finding.level == Level::Limited && finding.text.contains("not tried"), "{}", finding.text);
        assert!(finding.advice.is_some_and(|advice| advice.contains("root")));
        assert!(creation(false).advice.is_some_and(|advice| advice.contains("ip tuntap add")));
        assert_eq!(creation(true).level, Level::Good);
    }
}
