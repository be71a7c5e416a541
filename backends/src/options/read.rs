//! Reading options from any format that serde knows.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, Visitor};

use super::Options;

/// Reads options and passes them to `finish`. An error of `finish` is reported at the options' place in the input.
///
/// # Errors
/// For an option that is unknown, given twice, missing or malformed, and when `finish` refuses.
pub fn deserialize<'de, T, U, D>(deserializer: D, finish: fn(T) -> Result<U, String>) -> Result<U, D::Error>
where
    T: Options,
    D: Deserializer<'de>,
{
    deserializer.deserialize_map(Reader { finish, options: PhantomData })
}

struct Reader<T, U> {
    finish: fn(T) -> Result<U, String>,
    options: PhantomData<T>,
}

impl<'de, T: Options, U> Visitor<'de> for Reader<T, U> {
    type Value = U;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a table of the keys {}", T::names().join(", "))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<U, A::Error> {
        let mut options = T::default();
        let mut seen: Vec<&str> = Vec::new();
        while let Some(name) = map.next_key_seed(Name(T::names()))? {
            if seen.contains(&name) {
                return Err(A::Error::duplicate_field(name));
            }
            seen.push(name);
            options.read(name, &mut map)?;
        }
        let mut required = T::keys().iter().filter(|key| key.is_required);
        if let Some(key) = required.find(|key| !seen.contains(&key.name.as_str())) {
            return Err(A::Error::missing_field(&key.name));
        }
        (self.finish)(options).map_err(A::Error::custom)
    }
}

/// One of these names.
struct Name(&'static [&'static str]);

impl<'de> DeserializeSeed<'de> for Name {
    type Value = &'static str;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<&'static str, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl Visitor<'_> for Name {
    type Value = &'static str;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<&'static str, E> {
        self.0.iter().find(|known| **known == name).copied().ok_or_else(|| E::unknown_field(name, self.0))
    }
}
