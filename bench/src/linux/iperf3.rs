//! iperf3(1): the lines of options that a user gives for its client, and its results (`-J`).

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::shell::quote;
use crate::sample::Stream;

/// What the bench says itself.
const OWN: [&str; 8] = ["-c", "--client", "-s", "--server", "-J", "--json", "-p", "--port"];
/// Both directions at once have no figure of their own in iperf3's sums.
const BOTH: &str = "--bidir";

/// Reads lines of client options; `#` begins a comment.
///
/// # Errors
/// No line, or an option that is the bench's to give; with the line.
pub fn lines(text: &str) -> Result<Vec<String>> {
    let mut lines: Vec<String> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let words: Vec<_> = line.split('#').next().unwrap_or("").split_whitespace().collect();
        if words.is_empty() {
            continue;
        }
        let check = || -> Result<String> {
            for word in &words {
                // Values may be part of the word: -p5201, --port=5201.
                let is = |own: &&str| {
                    word.strip_prefix(*own)
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('=') || own.len() == 2)
                };
                ensure!(!OWN.iter().any(is), "{word} is given by the bench: leave it out");
                ensure!(*word != BOTH, "{BOTH} is two measurements: give two lines, one of them with -R");
            }
            ensure!(words[0].starts_with('-'), "options of iperf3's client are expected, as `-t 5 -P 2`");
            let line = words.join(" ");
            ensure!(!lines.contains(&line), "this line is there twice");
            Ok(line)
        };
        let line = check().with_context(|| format!("line {} (`{}`)", number + 1, line.trim()))?;
        lines.push(line);
    }
    ensure!(!lines.is_empty(), "there is no line of options in it");
    Ok(lines)
}

/// The shell's command for one line.
pub fn command(line: &str, server: &str) -> String {
    let words: String = line.split_whitespace().map(|word| format!(" {}", quote(word))).collect();
    format!("iperf3 -c {server} -J -i 0 --connect-timeout 5000{words}")
}

/// What one line has reached.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Bytes that arrived.
    pub bytes: u64,
    /// In this time.
    pub time: Duration,
    /// Each stream.
    pub streams: Vec<Stream>,
}

#[derive(Deserialize)]
struct Output {
    error: Option<String>,
    #[serde(default)]
    end: End,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct End {
    streams: Vec<Pair>,
    sum_received: Option<Way>,
}

#[derive(Deserialize)]
struct Pair {
    sender: Option<Way>,
    receiver: Option<Way>,
    udp: Option<Way>,
}

#[derive(Deserialize)]
struct Way {
    #[serde(default)]
    bytes: u64,
    seconds: f64,
    bits_per_second: f64,
    retransmits: Option<u64>,
    lost_percent: Option<f64>,
}

/// Reads what iperf3 has printed.
///
/// # Errors
/// It is none of its results, or one of a failure.
pub fn parse(text: &str) -> Result<Figures> {
    let Some(start) = text.find('{') else { bail!("iperf3 printed no result") };
    let mut values = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Output>();
    let output = values.next().context("iperf3 printed no result")?.context("iperf3's result is damaged")?;
    if let Some(error) = output.error {
        bail!("iperf3 failed: {}", error.lines().next().unwrap_or_default());
    }
    let Some(sum) = output.end.sum_received else { bail!("iperf3's result has no sum of what was received") };
    ensure!(sum.bytes > 0, "nothing has arrived");
    let time = Duration::try_from_secs_f64(sum.seconds).ok().filter(|time| !time.is_zero());
    let time = time.with_context(|| format!("iperf3 says that it took {} s", sum.seconds))?;
    let stream = |pair: Pair| {
        let retransmits = pair.sender.and_then(|way| way.retransmits);
        let way = pair.receiver.or(pair.udp)?;
        // Of datagrams the sender's side is told, and what part was lost.
        let arrived = 1.0 - way.lost_percent.unwrap_or(0.0).clamp(0.0, 100.0) / 100.0;
        Some(Stream { bits_per_second: way.bits_per_second * arrived, retransmits, lost_percent: way.lost_percent })
    };
    let streams = output.end.streams.into_iter().filter_map(stream).collect();
    Ok(Figures { bytes: sum.bytes, time, streams })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_what_is_not_theirs_to_say_is_refused() {
        let text = "# out\n-t 5  -P 2   # two streams\n\n-t 5 -R --parallel=2\n--cport 99 -C bbr\n";
        assert_eq!(lines(text).unwrap(), ["-t 5 -P 2", "-t 5 -R --parallel=2", "--cport 99 -C bbr"]);
        for (text, expected) in [
            ("# nothing\n", "no line"),
            ("-t 1\n-c 10.0.0.1", "line 2 (`-c 10.0.0.1`)"),
            ("-J", "given by the bench"),
            ("-t 1 --json", "given by the bench"),
            ("-p5201", "given by the bench"),
            ("--port=5201", "given by the bench"),
            ("-t 1 --bidir", "two lines"),
            ("bench/jobs/none.txt", "options of iperf3's client"),
            ("-t 1\n-t  1", "twice"),
        ] {
            let error = format!("{:#}", lines(text).unwrap_err());
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        }
        let command = command("-t 1 -R", "192.0.2.1");
        assert_eq!(command, "iperf3 -c 192.0.2.1 -J -i 0 --connect-timeout 5000 '-t' '1' '-R'");
    }

    const TCP: &str = r#"{"start":{},"end":{"streams":[
        {"sender":{"seconds":1.0,"bits_per_second":9e9,"retransmits":12},"receiver":{"seconds":1.0,"bits_per_second":8e9}},
        {"sender":{"seconds":1.0,"bits_per_second":9e9,"retransmits":0},"receiver":{"seconds":1.0,"bits_per_second":7e9}}],
        "sum_sent":{"bytes":5},"sum_received":{"bytes":1875000000,"seconds":1.0,"bits_per_second":15e9}}}"#;

    #[test]
    fn streams_have_their_rates_and_retransmits() {
        let figures = parse(TCP).unwrap();
        assert_eq!((figures.bytes, figures.time), (1_875_000_000, Duration::from_secs(1)));
        let streams: Vec<_> =
            figures.streams.iter().map(|stream| (stream.bits_per_second, stream.retransmits)).collect();
        assert_eq!(streams, [(8e9, Some(12)), (7e9, Some(0))]);
        let udp = r#"{"end":{"streams":[{"udp":{"seconds":1,"bits_per_second":1e8,"lost_percent":25}}],
            "sum_received":{"bytes":9375000,"seconds":1,"bits_per_second":75e6}}}"#;
        let figures = parse(udp).unwrap();
        assert_eq!((figures.streams[0].bits_per_second, figures.streams[0].lost_percent), (75e6, Some(25.0)));
    }

    #[test]
    fn bad_results_are_errors_of_one_line() {
        for cut in 0..TCP.len() {
            assert!(parse(&TCP[..cut]).is_err(), "{cut}");
        }
        for (text, expected) in [
            ("iperf3: error\n", "no result"),
            (r#"{"end":{},"error":"unable to connect to server: Connection refused"}"#, "Connection refused"),
            (r#"{"end":{"streams":[]}}"#, "no sum"),
            (r#"{"end":{"sum_received":{"bytes":0,"seconds":1,"bits_per_second":0}}}"#, "nothing has arrived"),
            (r#"{"end":{"sum_received":{"bytes":9,"seconds":-1,"bits_per_second":0}}}"#, "took -1 s"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        }
    }
}
