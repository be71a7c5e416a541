//! Text in a page: escaped, and numbers as people read them.

use crate::stats::Spread;

/// Text for content and for attributes in double quotes.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe += "&amp;",
            '<' => safe += "&lt;",
            '>' => safe += "&gt;",
            '"' => safe += "&quot;",
            '\'' => safe += "&#39;",
            // Control characters have no place in a page.
            letter if letter.is_control() && letter != '\n' => safe.push('\u{fffd}'),
            letter => safe.push(letter),
        }
    }
    safe
}

/// A command line that a shell reads back as these words.
pub(super) fn shell(words: &[String]) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./=,:+@%".contains(letter);
    let quote = |word: &String| {
        if !word.is_empty() && word.chars().all(plain) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// `1.15 M`, `563 k`, `420`.
pub(super) fn short(value: f64) -> String {
    let (value, unit) = match value {
        value if value >= 999_500.0 => (value / 1e6, " M"),
        value if value >= 10_000.0 => (value / 1e3, " k"),
        value => (value, ""),
    };
    let digits = match (unit, value) {
        ("", value) if value == value.trunc() || value >= 100.0 => 0,
        (" M", value) if value < 10.0 => 2,
        (_, value) if value < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$}{unit}")
}

/// The same for the ticks of an axis, which are round.
pub(super) fn tick(value: f64) -> String {
    let text = short(value);
    let (number, unit) = text.split_once(' ').unwrap_or((&text, ""));
    let number = if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number };
    if unit.is_empty() { number.to_owned() } else { format!("{number} {unit}") }
}

/// `1.2 µs`, `340 ns`, `5 ms`.
pub(super) fn time(ns: f64) -> String {
    let (value, unit) = match ns {
        ns if ns >= 1e9 => (ns / 1e9, "s"),
        ns if ns >= 1e6 => (ns / 1e6, "ms"),
        ns if ns >= 1e3 => (ns / 1e3, "µs"),
        ns => (ns, "ns"),
    };
    let digits = usize::from(value < 10.0 && value != value.trunc());
    format!("{value:.digits$} {unit}")
}

/// `(least–most)`.
pub(super) fn range(spread: Option<Spread>) -> String {
    spread.map_or_else(String::new, |spread| format!("{}–{}", short(spread.least), short(spread.most)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_meaning_in_html_is_escaped() {
        assert_eq!(escape("<a href=\"x\">'&\u{1}"), "&lt;a href=&quot;x&quot;&gt;&#39;&amp;\u{fffd}");
    }

    #[test]
    fn commands_can_be_pasted() {
        let words = ["/bin/x", "--a=b,c", "", "it's", "a b", "$(x)"].map(str::to_owned);
        assert_eq!(shell(&words), r"/bin/x --a=b,c '' 'it'\''s' 'a b' '$(x)'");
    }

    #[test]
    fn numbers_are_short() {
        let values = [0.0, 0.5, 42.0, 9_750.0, 44_100.0, 563_000.0, 999_700.0, 1_150_000.0, 12_300_000.0];
        assert_eq!(values.map(short), ["0", "0.5", "42", "9750", "44.1 k", "563 k", "1.00 M", "1.15 M", "12.3 M"]);
        assert_eq!([0.0, 80_000.0, 1_500_000.0, 62_500.0].map(tick), ["0", "80 k", "1.5 M", "62.5 k"]);
        assert_eq!([340.0, 1_200.0, 5e6, 15_400.0, 2e9].map(time), ["340 ns", "1.2 µs", "5 ms", "15 µs", "2 s"]);
    }
}
