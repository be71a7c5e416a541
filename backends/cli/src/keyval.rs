//! Option strings like `path=/x.img,direct=on,queues=4`: [`read`] into options, and written again by [`to_string`].
//!
//! `key=value` pairs are separated by commas; the first item may be a value alone where the option names a key for it.
//! Switches are `on` and `off`, lists are `[a,b]`, and a value in double quotes may hold commas, brackets and, doubled, quotes.

mod write;

use std::fmt;

use ringvm_backends::options::{Described, Options};
use serde::de::value::{SeqDeserializer, StrDeserializer};
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, Visitor};
use serde::forward_to_deserialize_any;

pub use write::{pairs, to_string};

/// Why a string can't be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl serde::de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self(format!("there is no key `{field}`; the keys are {}", expected.join(", ")))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self(format!("`{variant}` is not one of {}", expected.join(", ")))
    }

    fn missing_field(field: &'static str) -> Self {
        Self(format!("the key `{field}` is missing"))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self(format!("the key `{field}` is given twice"))
    }
}

/// Reads options. The first item may be the value of the positional option, if there is one.
///
/// # Errors
/// One line about what is wrong.
pub fn read<T: Described + DeserializeOwned>(input: &str) -> Result<T, String> {
    let positional = T::Options::keys().iter().find(|key| key.is_positional);
    from_str(input, positional.map(|key| key.name.as_str())).map_err(|error| error.to_string())
}

/// Reads `input` into a `T`. With `positional`, the first item may be the value of that key.
///
/// # Errors
/// When the string is malformed, or is not a `T`.
pub fn from_str<T: DeserializeOwned>(input: &str, positional: Option<&'static str>) -> Result<T, Error> {
    let pairs = parse(input, positional)?;
    T::deserialize(Pairs { pairs })
}

/// Reads a number of bytes.
///
/// # Errors
/// One line about what is wrong.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let shift = match &text[digits..] {
        "" => 0,
        "K" | "k" | "KiB" => 10,
        "M" | "m" | "MiB" => 20,
        "G" | "g" | "GiB" => 30,
        "T" | "t" | "TiB" => 40,
        _ => return Err(format!("`{text}` is not a size like 4096, 512M or 1G")),
    };
    let number: u64 = text[..digits].parse().map_err(|_| format!("`{text}` is not a size like 4096, 512M or 1G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is more than 64 bits of bytes"))
}

/// A value as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Word(String),
    List(Vec<String>),
}

/// Splits the string into pairs.
fn parse(input: &str, positional: Option<&'static str>) -> Result<Vec<(String, Value)>, Error> {
    let mut pairs: Vec<(String, Value)> = Vec::new();
    let mut rest = input;
    while !rest.is_empty() {
        let key_len = rest.find(['=', ',', '[', '"']).unwrap_or(rest.len());
        let key = match (rest[key_len..].starts_with('='), positional) {
            (true, _) => {
                let key = rest[..key_len].to_owned();
                rest = &rest[key_len + 1..];
                key
            }
            (false, Some(key)) if pairs.is_empty() => key.to_owned(),
            (false, _) => {
                let item = rest.split(',').next().unwrap_or(rest);
                return Err(Error(format!("`{item}` is not of the form key=value")));
            }
        };
        if key.is_empty() {
            return Err(Error(format!("there is no key before `={}`", rest.split(',').next().unwrap_or(rest))));
        }
        if pairs.iter().any(|(other, _)| *other == key) {
            return Err(Error(format!("the key `{key}` is given twice")));
        }
        let (value, after) = value(rest).map_err(|reason| Error(format!("{key}: {reason}")))?;
        pairs.push((key, value));
        rest = match after.strip_prefix(',') {
            Some("") => return Err(Error("it ends with a comma".into())),
            Some(next) => next,
            None => after,
        };
    }
    Ok(pairs)
}

/// Reads one value and returns what follows it: nothing, or a comma and more.
fn value(input: &str) -> Result<(Value, &str), String> {
    if let Some(mut rest) = input.strip_prefix('[') {
        let mut items = Vec::new();
        if let Some(rest) = rest.strip_prefix(']') {
            return Ok((Value::List(items), end(rest)?));
        }
        loop {
            let (item, after) = word(rest, &[',', ']'])?;
            items.push(item);
            if let Some(after) = after.strip_prefix(']') {
                return Ok((Value::List(items), end(after)?));
            }
            rest = after.strip_prefix(',').ok_or("the list is not closed with `]`")?;
        }
    }
    let (word, rest) = word(input, &[','])?;
    Ok((Value::Word(word), end(rest)?))
}

fn end(rest: &str) -> Result<&str, String> {
    if rest.is_empty() || rest.starts_with(',') { Ok(rest) } else { Err(format!("a comma is missing before `{rest}`")) }
}

/// Reads a word up to one of `stops`, or a quoted one.
fn word<'a>(input: &'a str, stops: &[char]) -> Result<(String, &'a str), String> {
    if let Some(mut rest) = input.strip_prefix('"') {
        let mut word = String::new();
        loop {
            let (part, after) = rest.split_once('"').ok_or("the quote is not closed")?;
            word.push_str(part);
            match after.strip_prefix('"') {
                None => return Ok((word, after)),
                Some(more) => {
                    word.push('"');
                    rest = more;
                }
            }
        }
    }
    let end = input.find(stops).unwrap_or(input.len());
    Ok((input[..end].to_owned(), &input[end..]))
}

struct Pairs {
    pairs: Vec<(String, Value)>,
}

impl<'de> Deserializer<'de> for Pairs {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Map { pairs: self.pairs.into_iter(), value: None })
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct enum identifier ignored_any
    }
}

struct Map {
    pairs: std::vec::IntoIter<(String, Value)>,
    value: Option<(String, Value)>,
}

impl<'de> MapAccess<'de> for Map {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some((key, value)) = self.pairs.next() else { return Ok(None) };
        let result = seed.deserialize(StrDeserializer::<Error>::new(&key)).map(Some);
        self.value = Some((key, value));
        result
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let (key, value) = self.value.take().ok_or_else(|| Error("a value was asked for before its key".into()))?;
        seed.deserialize(ValueDeserializer(value)).map_err(|Error(reason)| Error(format!("{key}: {reason}")))
    }
}

struct ValueDeserializer(Value);

impl ValueDeserializer {
    fn word(self) -> Result<String, Error> {
        match self.0 {
            Value::Word(word) => Ok(word),
            Value::List(_) => Err(Error("a list, where one value is expected".into())),
        }
    }

    fn unsigned(self) -> Result<u64, Error> {
        let word = self.word()?;
        let parsed = match word.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => word.parse(),
        };
        parsed.map_err(|_| Error(format!("`{word}` is not a whole number")))
    }

    /// A number of 64 bits may well be a size: `10G`.
    fn size(self) -> Result<u64, Error> {
        match &self.0 {
            Value::Word(word) if !word.starts_with("0x") => parse_size(word).map_err(Error),
            _ => self.unsigned(),
        }
    }

    fn signed(self) -> Result<i64, Error> {
        let word = self.word()?;
        word.parse().map_err(|_| Error(format!("`{word}` is not a whole number")))
    }
}

impl IntoDeserializer<'_, Error> for ValueDeserializer {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! integers {
    ($($method:ident $via:ident $visit:ident $number:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            let number = self.$via()?;
            let fits = $number::try_from(number).map_err(|_| {
                Error(format!("{number} is out of range, it can be from {} to {}", $number::MIN, $number::MAX))
            })?;
            visitor.$visit(fits)
        })*
    };
}

impl<'de> Deserializer<'de> for ValueDeserializer {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Word(word) => visitor.visit_string(word),
            Value::List(_) => self.deserialize_seq(visitor),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let word = self.word()?;
        match word.as_str() {
            "on" | "true" => visitor.visit_bool(true),
            "off" | "false" => visitor.visit_bool(false),
            _ => Err(Error(format!("`{word}` is neither on nor off"))),
        }
    }

    integers! {
        deserialize_u8 unsigned visit_u8 u8
        deserialize_u16 unsigned visit_u16 u16
        deserialize_u32 unsigned visit_u32 u32
        deserialize_u64 size visit_u64 u64
        deserialize_i8 signed visit_i8 i8
        deserialize_i16 signed visit_i16 i16
        deserialize_i32 signed visit_i32 i32
        deserialize_i64 signed visit_i64 i64
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let items = match self.0 {
            Value::List(items) => items,
            // A list of one needs no brackets.
            Value::Word(word) => vec![word],
        };
        visitor.visit_seq(SeqDeserializer::new(items.into_iter().map(|item| Self(Value::Word(item)))))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_enum(self.word()?.into_deserializer())
    }

    forward_to_deserialize_any! {
        i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple tuple_struct map struct identifier
        ignored_any
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;

    #[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
    #[serde(rename_all = "kebab-case")]
    enum Kind {
        Raw,
        ThinRaw,
    }

    #[derive(Debug, Deserialize, PartialEq, Eq, Serialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Options {
        path: String,
        #[serde(default)]
        direct: bool,
        queue_size: Option<u16>,
        #[serde(default)]
        cpus: Vec<usize>,
        kind: Option<Kind>,
        #[serde(default)]
        offset: i32,
        size: Option<u64>,
    }

    fn options(input: &str) -> Result<Options, String> {
        from_str(input, Some("path")).map_err(|error| error.to_string())
    }

    #[test]
    fn every_kind_of_value_is_read() {
        let all = "path=/x.img,direct=on,queue-size=256,cpus=[0,1,7],kind=thin-raw,offset=-3,size=3K";
        let expected = Options {
            path: "/x.img".into(),
            direct: true,
            queue_size: Some(256),
            cpus: vec![0, 1, 7],
            kind: Some(Kind::ThinRaw),
            offset: -3,
            size: Some(3072),
        };
        assert_eq!(options(all).unwrap(), expected);
        assert_eq!(options("/x.img").unwrap().path, "/x.img");
        assert_eq!(options("/x.img,cpus=3").unwrap().cpus, [3]);
        assert_eq!(options("path=\"/a,b=[c].img\",direct=off").unwrap().path, "/a,b=[c].img");
        assert_eq!(options("\"/a,b\",queue-size=0x10").unwrap().queue_size, Some(16));
        assert_eq!(options("path=/a=b").unwrap().path, "/a=b");
        assert_eq!(options("/x,cpus=[]").unwrap().cpus, [0_usize; 0]);
    }

    #[test]
    fn mistakes_are_named() {
        for (input, expected) in [
            ("path=/x,dirct=on", "there is no key `dirct`; the keys are path, direct"),
            ("path=/x,path=/y", "`path` is given twice"),
            ("/x,path=/y", "`path` is given twice"),
            ("direct=on", "`path` is missing"),
            ("", "`path` is missing"),
            ("/x,direct=maybe", "direct: `maybe` is neither on nor off"),
            ("/x,queue-size=many", "queue-size: `many` is not a whole number"),
            ("/x,queue-size=99999", "queue-size: 99999 is out of range, it can be from 0 to 65535"),
            ("/x,kind=qcow9", "kind: `qcow9` is not one of raw, thin-raw"),
            ("/x,direct", "`direct` is not of the form key=value"),
            ("/x,", "ends with a comma"),
            ("/x,,direct=on", "is not of the form key=value"),
            ("/x,=on", "there is no key before `=on`"),
            ("/x,cpus=[1,2", "not closed"),
            ("/x,cpus=[1]2", "comma is missing before `2`"),
            ("path=\"/x", "quote is not closed"),
            ("/x,direct=[on]", "direct: a list"),
        ] {
            let error = options(input).unwrap_err();
            assert!(error.contains(expected), "{input}: {error}");
        }
    }

    /// The fuzz target of the option parser; `cargo bolero test keyval::tests::fuzz` runs it for hours.
    #[test]
    fn fuzz_any_string_is_read_or_refused() {
        bolero::check!().with_type::<String>().for_each(|input| {
            if let Ok(options) = options(input) {
                let text = to_string(&options).expect("text has room for text");
                assert_eq!(super::from_str::<Options>(&text, None).as_ref(), Ok(&options), "{text}");
            }
        });
    }

    #[test]
    fn sizes_are_read_or_refused() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("1K", 1024), ("512M", 512 << 20), ("2GiB", 2 << 30), ("1t", 1 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in ["", "G", "-1", "1.5G", "1GB", " 1G", "99999999999T", "1G1"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
