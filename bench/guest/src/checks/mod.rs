//! Jobs that check: what is stored, what is answered to rules that are kept and broken, what the machine has.

pub mod beside;
pub mod drained;
pub mod entropy;
pub mod framing;
pub mod hostile;
pub mod hotplug;
pub mod info;
pub mod lane;
pub mod model;
pub mod net_hostile;
pub mod verify;
