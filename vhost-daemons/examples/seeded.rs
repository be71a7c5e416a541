//! An entropy device whose bytes follow from a seed, for guests whose runs are to repeat. A device of one's own: what a request
//! means is a `Handler`, and the rest of the device is said once.
//!
//! ```text
//! cargo run --release -p ringvm-vhost-daemons --example seeded -- --socket /run/s.sock --rng 42
//! ringvm run --kernel vmlinuz … --vhost-user type=rng,socket=/run/s.sock
//! ```

use std::process::ExitCode;

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

/// What the one queue does.
struct Generator(u64);

impl Handler for Generator {
    type Request = ();

    const OPS: &'static [&'static str] = &["read"];

    fn start(&mut self, chain: &mut Chain, (): &mut (), _: &mut Io<'_>) -> Step {
        let mut bytes = [0; 256];
        for word in bytes.chunks_mut(8) {
            // Knuth's generator; the high half of its state is the better one.
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&(self.0 ^ self.0 >> 32).to_le_bytes());
        }
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
    features: u64,
    queues: Queues,
}

impl Device for Seeded {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn ack_features(&mut self, features: u64) -> Result<(), DeviceError> {
        self.features = features;
        self.info.check_features(features)
    }

    fn start_queue(&mut self, index: u16, parts: QueueParts) -> Result<(), DeviceError> {
        let seed = self.seed;
        self.queues.start(index, parts, self.features, move || Generator(seed))
    }

    fn stop(&mut self, queues: &[u16], end: End) -> Stopping {
        self.queues.stop(queues, end)
    }

    fn reset(&mut self) {
        self.queues.reset();
    }

    fn save_state(&self) -> Result<Vec<u8>, DeviceError> {
        Ok(Vec::new())
    }

    fn load_state(&mut self, _: &[u8]) -> Result<(), DeviceError> {
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
            Ok(Box::new(Seeded { info, seed, features: 0, queues: Queues::new(name, 1, pool.clone()) }))
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
