//! The notation for the values of a type, found out by asking the type to read one.

use std::fmt;

use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde::forward_to_deserialize_any;

use serde::de::DeserializeOwned;

/// The notation for a value of the type in a help text: `N`, `on|off`, the words of an enumeration.
#[must_use]
pub fn shape<T: DeserializeOwned>() -> String {
    match T::deserialize(Probe) {
        Err(Shape(shape)) => shape,
        Ok(_) => "VALUE".to_owned(),
    }
}

/// Answers every request for a value with its shape, as an error.
struct Probe;

#[derive(Debug)]
struct Shape(String);

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Shape {}

impl Error for Shape {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self("VALUE".to_owned())
    }
}

macro_rules! answers {
    ($($method:ident $shape:literal)*) => {
        $(fn $method<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Shape> {
            Err(Shape($shape.to_owned()))
        })*
    };
}

impl<'de> Deserializer<'de> for Probe {
    type Error = Shape;

    answers! {
        deserialize_any "VALUE"
        deserialize_bool "on|off"
        deserialize_i8 "N" deserialize_i16 "N" deserialize_i32 "N" deserialize_i64 "N"
        deserialize_u8 "N" deserialize_u16 "N" deserialize_u32 "N" deserialize_u64 "SIZE"
        deserialize_str "TEXT" deserialize_string "TEXT"
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Shape> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Shape> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        words: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Shape> {
        Err(Shape(words.join("|")))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Shape> {
        match visitor.visit_seq(Items) {
            Err(Shape(item)) => Err(Shape(format!("[{item},…]"))),
            Ok(_) => Err(Shape("[…]".to_owned())),
        }
    }

    forward_to_deserialize_any! {
        i128 u128 f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct map struct identifier ignored_any
    }
}

/// A list whose items are asked for their shape.
struct Items;

impl<'de> SeqAccess<'de> for Items {
    type Error = Shape;

    fn next_element_seed<T: serde::de::DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Shape> {
        seed.deserialize(Probe).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Speed {
        Slow,
        VeryFast,
    }

    #[derive(Deserialize)]
    #[serde(try_from = "String")]
    struct Word;

    impl TryFrom<String> for Word {
        type Error = String;

        fn try_from(text: String) -> Result<Self, String> {
            Err(text)
        }
    }

    #[test]
    fn types_say_what_their_values_look_like() {
        assert_eq!(shape::<bool>(), "on|off");
        assert_eq!((shape::<u16>(), shape::<Option<i32>>()), ("N".into(), "N".into()));
        assert_eq!(shape::<Option<u64>>(), "SIZE");
        assert_eq!(shape::<Vec<u16>>(), "[N,…]");
        assert_eq!((shape::<String>(), shape::<Option<Word>>()), ("TEXT".into(), "TEXT".into()));
        assert_eq!(shape::<Speed>(), "slow|very-fast");
        assert_eq!(shape::<Option<Speed>>(), "slow|very-fast");
    }
}
