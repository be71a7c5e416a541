//! The options of I/O threads, which every program has that serves devices.

use std::time::Duration;

use clap::Args;
use ringvm_backends::io::reactor::ReactorOptions;
use ringvm_backends::options;
use ringvm_backends::options::Check;

use crate::keyval;

const MAX_THREADS: usize = 256;
const MAX_POLL_US: u64 = 1_000_000;

options! {
    /// The I/O threads of a program.
    #[derive(Args, Clone, Debug, PartialEq, Eq)]
    pub struct IoOptions {
        /// Number of I/O threads [default: one per queue, at most one per host CPU]
        #[key(value("N"))]
        #[arg(long, value_name = "N")]
        pub io_threads: Option<usize>,
        /// Host CPUs of the I/O threads, e.g. 0,1
        #[key(value("CPUS"))]
        #[arg(long, value_name = "CPUS", value_delimiter = ',')]
        pub io_affinity: Vec<usize>,
        /// Longest time in microseconds that an I/O thread polls before it sleeps; 0 never polls
        #[key(value("MICROSECONDS"))]
        #[arg(long, value_name = "MICROSECONDS")]
        pub poll_us: Option<u64>,
    }
}

impl Check for IoOptions {
    fn check(&self) -> Result<(), String> {
        if self.io_threads == Some(0) {
            return Err("--io-threads 0 would leave nobody to serve the devices; use 1 or more, or leave it out".into());
        }
        if let Some(threads) = self.io_threads
            && threads > MAX_THREADS
        {
            return Err(format!("--io-threads {threads} is more than {MAX_THREADS}, one per CPU is enough"));
        }
        if let Some(poll) = self.poll_us
            && poll > MAX_POLL_US
        {
            return Err(format!("--poll-us {poll} is more than {MAX_POLL_US}, a second; 0 never polls"));
        }
        Ok(())
    }
}

impl IoOptions {
    /// These options, and `others` where these say nothing.
    #[must_use]
    pub fn or(self, others: Self) -> Self {
        Self {
            io_threads: self.io_threads.or(others.io_threads),
            io_affinity: if self.io_affinity.is_empty() { others.io_affinity } else { self.io_affinity },
            poll_us: self.poll_us.or(others.poll_us),
        }
    }

    /// The reactors for so many queues. `hold_memory` is the number of bytes that the kernel may hold for I/O.
    #[must_use]
    pub fn reactors(&self, queues: usize, hold_memory: u64) -> ReactorOptions {
        let default = ReactorOptions::default();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        ReactorOptions {
            count: self.io_threads.unwrap_or(queues.clamp(1, cpus)),
            affinity: self.io_affinity.clone(),
            poll: self.poll_us.map_or(default.poll, Duration::from_micros),
            hold_memory,
            ..default
        }
    }

    /// The options that make reactors like these, but no more of them than there are queues.
    #[must_use]
    pub fn of(reactors: &ReactorOptions, queues: usize) -> Self {
        Self {
            io_threads: Some(reactors.count.min(queues).max(1)),
            io_affinity: reactors.affinity.clone(),
            poll_us: Some(u64::try_from(reactors.poll.as_micros()).unwrap_or(u64::MAX)),
        }
    }

    /// The command line that is read as these options.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let pairs = keyval::pairs(self).unwrap_or_default().into_iter();
        // A list on the command line has no brackets.
        pairs.map(|(key, value)| format!("--{key}={}", value.trim_matches(['[', ']']))).collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        io: IoOptions,
    }

    fn read(arguments: &[String]) -> IoOptions {
        Cli::try_parse_from(["program".to_owned()].iter().chain(arguments)).unwrap().io
    }

    #[test]
    fn arguments_are_read_as_the_same_options() {
        for options in [
            IoOptions::default(),
            IoOptions { io_threads: Some(3), io_affinity: vec![0, 5, 2], poll_us: Some(0) },
            IoOptions { io_affinity: vec![7], ..IoOptions::default() },
        ] {
            assert_eq!(read(&options.arguments()), options);
        }
    }

    #[test]
    fn a_daemon_gets_the_same_threads_but_not_more_than_queues() {
        let reactors = ReactorOptions { count: 4, affinity: vec![1], ..ReactorOptions::default() };
        for (queues, count) in [(0, 1), (3, 3), (9, 4)] {
            let told = read(&IoOptions::of(&reactors, queues).arguments()).reactors(queues, 0);
            assert_eq!((told.count, told.affinity, told.poll), (count, vec![1], reactors.poll));
        }
    }

    #[test]
    fn what_can_not_be_is_refused() {
        let refusal = |options: IoOptions| options.check().unwrap_err();
        assert!(refusal(IoOptions { io_threads: Some(0), ..IoOptions::default() }).contains("--io-threads 0"));
        assert!(refusal(IoOptions { io_threads: Some(257), ..IoOptions::default() }).contains("more than 256"));
        assert!(refusal(IoOptions { poll_us: Some(1_000_001), ..IoOptions::default() }).contains("--poll-us 1000001"));
        IoOptions { io_threads: Some(256), poll_us: Some(1_000_000), ..IoOptions::default() }.check().unwrap();
    }
}
