//! The end of a machine: the guest is stopped, its devices are taken back and flushed, all at once, and every wait
//! has a limit. A disk whose storage never answers must not keep the other disks from being flushed.

use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use ringvm_backends::device::Device;
use ringvm_backends::stats::DeviceStats;
use ringvm_backends::trace;
use tracing::{debug_span, warn};

use super::Running;
use crate::kvm::VcpuThread;
use crate::owner::Taken;

/// When the parts of an end are given up.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    whole: Duration,
    /// The vCPUs, one of which may wait for a device.
    vcpus: Instant,
    /// The devices' requests in flight; most of them are cancelled.
    stopped: Instant,
    /// The flush of written data that is not durable yet.
    flushed: Instant,
    /// The devices and their daemons.
    gone: Instant,
}

impl Limits {
    /// The limits of an end that begins now and takes no longer than `whole`.
    #[must_use]
    pub fn within(whole: Duration) -> Self {
        let now = Instant::now();
        let part = |tenths| now + whole * tenths / 10;
        Self { whole, vcpus: part(2), stopped: part(6), flushed: part(8), gone: part(9) }
    }
}

/// The remains of a machine.
#[derive(Default)]
pub struct Stopped {
    /// Its devices, reset, in the order of their slots.
    pub devices: Vec<Box<dyn Device>>,
    /// Statistics of each.
    pub stats: Vec<DeviceStats>,
    /// The parts that did not end in time, a line each. They are abandoned, and go when the process exits.
    pub abandoned: Vec<String>,
}

impl Running {
    /// Stops the guest, then the devices, and takes them back.
    #[must_use]
    pub fn stop(self, limits: Limits) -> Stopped {
        let mut stopped = Stopped::default();
        let Self { threads, board } = self;
        let late = VcpuThread::stop_all(threads, limits.vcpus);
        let functions = std::mem::take(&mut *board.lock());
        // All devices are told before the first is waited for.
        let taken: Vec<_> =
            functions.into_values().map(|function| (function.name, function.questions.take())).collect();
        for (name, taken) in taken {
            match taken.recv_deadline(limits.stopped) {
                Ok(Taken { device, stats }) => {
                    stopped.devices.push(device);
                    stopped.stats.push(stats);
                }
                Err(_) => stopped
                    .abandoned
                    .push(format!("{name}: given up with requests in flight, what the guest wrote last may be lost")),
            }
        }
        for vcpu in VcpuThread::stop_all(late, limits.stopped) {
            stopped.abandoned.push(format!("vCPU {} did not stop", vcpu.id()));
        }
        stopped
    }
}

/// Makes the devices' written data durable. Returns those that answered, and a line for each that failed or took too
/// long.
#[must_use]
pub fn flush(devices: Vec<Box<dyn Device>>, limits: Limits) -> (Vec<Box<dyn Device>>, Vec<String>) {
    let flushes = devices.into_iter().map(|mut device| {
        (device.info().name.clone(), move || {
            let flushed = debug_span!("flush").in_scope(|| device.flush());
            (device, flushed)
        })
    });
    let (mut answered, mut failures) = (Vec::new(), Vec::new());
    for (name, flushed) in all_until(limits.flushed, flushes.collect()) {
        let failed = match flushed {
            Some((device, flushed)) => {
                answered.push(device);
                flushed.err().map(|error| error.to_string())
            }
            None => Some(format!("{name}: flushing did not end within --stop-timeout={}", limits.whole.as_secs())),
        };
        failures.extend(failed.map(|what| format!("{what}, what the guest wrote last may be lost")));
    }
    (answered, failures)
}

/// Lets devices go, with their daemons, all at once. One that takes too long is left to the end of the process.
pub fn let_go(devices: Vec<Box<dyn Device>>, limits: Limits) {
    let going = devices
        .into_iter()
        .map(|device| (device.info().name.clone(), move || debug_span!("let_go").in_scope(|| drop(device))));
    all_until(limits.gone, going.collect());
}

/// Does all at once, each on a thread of its own. Of those that do not end until `deadline` there is no result.
fn all_until<T: Send + 'static>(
    deadline: Instant,
    work: Vec<(String, impl FnOnce() -> T + Send + 'static)>,
) -> Vec<(String, Option<T>)> {
    let started: Vec<(String, Receiver<T>)> = work
        .into_iter()
        .map(|(name, work)| {
            let (done, result) = unbounded();
            let thread = thread::Builder::new().name(format!("end-{name}"));
            let span = trace::device(&name);
            let entered = span.clone();
            let spawned = thread.spawn(move || {
                // The receiver may have given up.
                entered.in_scope(|| drop(done.send(work())));
            });
            if let Err(error) = spawned {
                span.in_scope(|| warn!(%error, "starting a thread"));
            }
            (name, result)
        })
        .collect();
    let wait = |(name, result): (String, Receiver<T>)| {
        let result = result.recv_deadline(deadline).ok();
        (name, result)
    };
    started.into_iter().map(wait).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_never_ends_keeps_nobody_from_a_result() {
        let (never, silence) = unbounded::<()>();
        let wait = |receiver: Receiver<()>| move || receiver.recv().is_ok();
        let (quick, news) = unbounded();
        quick.send(()).unwrap();
        let work = vec![("stuck".to_owned(), wait(silence)), ("quick".to_owned(), wait(news))];
        let results = all_until(Instant::now() + Duration::from_millis(200), work);
        assert_eq!(results, [("stuck".to_owned(), None), ("quick".to_owned(), Some(true))]);
        drop(never);
    }
}
