//! Statistics for people: a few lines per device.

use std::fmt::Write as _;

use ringvm_backends::stats::{DeviceStats, QueueStats};

/// All devices, for standard error.
#[must_use]
pub fn summary(devices: &[DeviceStats]) -> String {
    let mut text = String::new();
    for device in devices {
        let name = &device.name;
        let Some(total) = device.total() else { continue };
        // Writing to a string does not fail.
        _ = writeln!(text, "{name}: {}", line(&total));
        for op in total.ops.iter().filter(|op| op.count > 0) {
            _ = writeln!(
                text,
                "{name}: {}: {} operations, {} bytes, {} errors",
                op.name, op.count, op.bytes, op.errors
            );
        }
        if device.queues.len() > 1 {
            for (index, queue) in &device.queues {
                _ = writeln!(text, "{name}: queue {index}: {}", line(queue));
            }
        }
    }
    if devices.is_empty() {
        text.push_str("no devices\n");
    }
    text
}

fn line(stats: &QueueStats) -> String {
    let (operations, errors) =
        stats.ops.iter().fold((0, 0), |(count, errors), op| (count + op.count, errors + op.errors));
    let latency = |part: f64| duration(stats.latency.quantile(part));
    let times = if stats.latency.is_empty() {
        "no latencies".to_owned()
    } else {
        format!(
            "latency p50 {} p99 {} p99.9 {} max {}",
            latency(0.5),
            latency(0.99),
            latency(0.999),
            duration(stats.latency.max())
        )
    };
    format!(
        "{operations} operations, {errors} errors, {times}, {} kicks, {} interrupts ({} suppressed), {} polls hit, {} missed, \
         {} bad chains",
        stats.kicks,
        stats.interrupts,
        stats.interrupts_suppressed,
        stats.poll_hits,
        stats.poll_misses,
        stats.bad_chains
    )
}

fn duration(nanoseconds: u64) -> String {
    match nanoseconds {
        0..10_000 => format!("{:.1} us", nanoseconds as f64 / 1e3),
        10_000..10_000_000 => format!("{} us", nanoseconds / 1000),
        _ => format!("{} ms", nanoseconds / 1_000_000),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_device_is_summed_up_in_lines() {
        let mut queue = QueueStats::new(&["read", "write", "flush"]);
        (queue.kicks, queue.interrupts) = (2, 1);
        let seen = Instant::now();
        queue.record(0, 4096, true, seen, seen + Duration::from_micros(5));
        queue.record(2, 0, false, seen, seen + Duration::from_millis(1));
        queue.settle();
        let other = QueueStats::new(&["read", "write", "flush"]);
        let device = DeviceStats { name: "disk0".into(), queues: vec![(0, queue), (1, other)] };
        let text = summary(&[device]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert!(lines[0].starts_with("disk0: 2 operations, 1 errors, latency p50 5.0 us p99 1"), "{text}");
        assert!(lines[0].contains("2 kicks, 1 interrupts"), "{text}");
        assert!(text.contains("disk0: read: 1 operations, 4096 bytes, 0 errors"), "{text}");
        assert!(lines[4].contains("queue 1: 0 operations, 0 errors, no latencies"), "{text}");
        assert_eq!(summary(&[]), "no devices\n");
    }
}
