//! An entropy device whose bytes follow from a seed, for guests whose runs are to repeat: the bytes begin anew with each
//! reset. A device of one's own: what a request
//! means is a `Handler`, and the rest of the device is said once.
//!
//! ```text
//! cargo run --release -p ringvm-vhost-daemons --example seeded -- --socket /run/s.sock --rng 42
//! ringvm run --kernel vmlinuz … --vhost-user type=rng,socket=/run/s.sock
//! ```

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::Parser;
use ringvm_backends::device::{Device, DeviceError, DeviceInfo, QueueParts};
use ringvm_backends::io::ops::Io;
use ringvm_backends::io::queues::Queues;
use ringvm_backends::io::worker::{Handler, Outcome, Step};
use ringvm_backends::stats::DeviceStats;
use ringvm_backends::virtqueue::End;
use ringvm_backends::virtqueue::buffers::Chain;
use ringvm_backends::virtqueue::split::RING_FEATURES;
use ringvm_backends::virtqueue::stopping::Stopping;
use ringvm_cli::usage;
use ringvm_vhost_daemons::exit::Exit;
use ringvm_vhost_daemons::options::ServeOptions;
use ringvm_vhost_daemons::{Program, serve};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

/// What the one queue does. The device keeps the generator's state: a queue that stops and starts again goes on.
struct Generator(Arc<AtomicU64>);

impl Handler for Generator {
    type Request = ();

    const OPS: &'static [&'static str] = &["read"];

    fn start(&mut self, chain: &mut Chain, (): &mut (), _: &mut Io<'_>) -> Step {
        let (mut bytes, mut state) = ([0; 256], self.0.load(Ordering::Relaxed));
        for word in bytes.chunks_mut(8) {
            // Knuth's generator; the high half of its state is the better one.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&(state ^ state >> 32).to_le_bytes());
        }
        self.0.store(state, Ordering::Relaxed);
        let written = chain.writable.copy_from(&bytes);
        Step::Done(Outcome { op: 0, written: written as u32, bytes: written as u64, ok: written > 0 })
    }

    fn resume(&mut self, _: &mut Chain, (): &mut (), _: i32, _: &mut Io<'_>) -> Step {
        Step::Fault("no request waits for anything")
    }
}

struct Seeded {
    info: DeviceInfo,
    seed: u64,
    state: Arc<AtomicU64>,
    features: u64,
    queues: Queues,
}

impl Device for Seeded {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn ack_features(&mut self, features: u64) -> Result<(), DeviceError> {
        self.info.check_features(features)?;
        self.features = features;
        Ok(())
    }

    fn start_queue(&mut self, index: u16, parts: QueueParts) -> Result<(), DeviceError> {
        let state = Arc::clone(&self.state);
        self.queues.start(index, parts, self.features, move || Generator(state))
    }

    fn stop(&mut self, queues: &[u16], end: End) -> Stopping {
        self.queues.stop(queues, end)
    }

    fn reset(&mut self) {
        self.queues.reset();
        self.state.store(self.seed, Ordering::Relaxed);
    }

    fn save_state(&self) -> Result<Vec<u8>, DeviceError> {
        Ok(self.state.load(Ordering::Relaxed).to_le_bytes().into())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let refused = |_| DeviceError::State { device: self.info.name.clone(), reason: "it is not of 8 bytes" };
        self.state.store(u64::from_le_bytes(state.try_into().map_err(refused)?), Ordering::Relaxed);
        Ok(())
    }

    fn stats(&self) -> DeviceStats {
        self.queues.stats()
    }
}

/// Serves entropy devices that repeat themselves.
#[derive(Parser)]
struct Cli {
    /// Add a device with this seed
    #[arg(long, value_name = "SEED")]
    rng: Vec<String>,
    #[command(flatten)]
    serve: ServeOptions,
}

fn main() -> ExitCode {
    let program = Program {
        name: "seeded",
        kind: "rng",
        read: |text| text.parse::<u64>().map_err(|error| error.to_string()),
        queues: |_| 1,
        open: |name, &seed, pool| {
            let (device_type, queue_sizes) = (VIRTIO_ID_RNG, vec![64]);
            let info =
                DeviceInfo { device_type, name: name.into(), features: RING_FEATURES, queue_sizes, config_len: 0 };
            let (state, queues) = (Arc::new(seed.into()), Queues::new(name, 1, pool.clone()));
            Ok(Box::new(Seeded { info, seed, state, features: 0, queues }))
        },
    };
    match usage::parse::<Cli>("seeded", |command| command) {
        Ok(cli) => serve(&program, &cli.serve, &cli.rng).into(),
        Err(message) => {
            eprintln!("seeded: {message}");
            Exit::Configuration.into()
        }
    }
}
