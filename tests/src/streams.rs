//! What `lab-stream`, the program that moves data over one connection, says at either end.

/// The report of one end.
#[derive(Clone, Debug)]
pub struct Streamed {
    /// The checksum of what went over the connection.
    pub sum: String,
    bytes: u64,
    seconds: f64,
}

impl Streamed {
    /// Reads the report of an end that has moved so many bytes.
    ///
    /// # Panics
    /// When it is no report, or of another number of bytes.
    #[track_caller]
    pub fn read(said: &str, bytes: u64) -> Self {
        let word = |key: &str| said.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        assert_eq!(word("bytes"), Some(bytes.to_string().as_str()), "lab-stream said: {said}");
        let milliseconds = word("milliseconds").and_then(|word| word.parse::<f64>().ok());
        let (Some(sum), Some(milliseconds)) = (word("sum"), milliseconds) else { panic!("lab-stream said: {said}") };
        Self { sum: sum.to_owned(), bytes, seconds: milliseconds / 1000.0 }
    }

    /// MiB/s.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / f64::from(1 << 20) / self.seconds
    }
}

/// Whether an end says that the other one is gone.
pub fn is_of_a_lost_peer(said: &str) -> bool {
    said.contains("Broken pipe") || said.contains("Connection reset")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read() {
        let streamed = Streamed::read("bytes=2097152 sum=0123abcd milliseconds=500\n", 2 << 20);
        assert_eq!((streamed.sum.as_str(), streamed.rate()), ("0123abcd", 4.0));
    }

    #[test]
    #[should_panic(expected = "lab-stream said")]
    fn a_report_of_fewer_bytes_is_none() {
        Streamed::read("bytes=5 sum=0123abcd milliseconds=500", 6);
    }
}
