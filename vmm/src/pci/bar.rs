//! A 64-bit memory BAR: sizing, moving, and where it may answer (PCI 3.0, 6.2.5.1).

use std::ops::Range;

use super::config::{COMMAND_MEMORY, ConfigSpace, reg};

/// 64 bits wide.
const TYPE_64: u32 = 2 << 1;
const PREFETCHABLE: u32 = 1 << 3;

/// Where BARs may be. Outside a guest could lay one over its RAM, the interrupt controllers or the configuration space.
#[derive(Clone, Debug)]
pub struct BarWindow(Vec<Range<u64>>);

impl BarWindow {
    /// BARs may lie within any of `ranges`.
    #[must_use]
    pub fn new(ranges: &[Range<u64>]) -> Self {
        Self(ranges.to_vec())
    }

    fn contains(&self, base: u64, size: u64) -> bool {
        self.0.iter().any(|range| range.contains(&base) && size <= range.end - base)
    }
}

/// The BAR in the first two base address registers.
#[derive(Clone, Debug)]
pub struct Bar {
    size: u64,
    window: BarWindow,
}

impl Bar {
    /// Adds a BAR of `size` bytes, a power of two of at least 4 KiB, at `base` to `space`.
    #[must_use]
    pub fn new(space: &mut ConfigSpace, size: u64, base: u64, window: BarWindow) -> Self {
        assert!(size.is_power_of_two() && size >= 4096, "a BAR is a power of two of at least a page");
        space.put(reg::BAR0, &(base | u64::from(TYPE_64 | PREFETCHABLE)).to_le_bytes());
        // Writing all ones and reading back is how software learns the size.
        space.allow(reg::BAR0, &(!(size - 1)).to_le_bytes());
        Self { size, window }
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the function answers now, if it does.
    #[must_use]
    pub fn decoded(&self, space: &ConfigSpace) -> Option<u64> {
        let base = u64::from(space.dword(reg::BAR0 + 4)) << 32 | u64::from(space.dword(reg::BAR0)) & !0xf;
        let enabled = space.command() & COMMAND_MEMORY != 0;
        (enabled && self.window.contains(base, self.size)).then_some(base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Identity;

    #[test]
    fn a_bar_is_sized_and_moved_within_its_window() {
        let identity = Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem_vendor: 0, subsystem: 0 };
        let mut space = ConfigSpace::new(&identity, COMMAND_MEMORY);
        let window = BarWindow::new(&[0xc000_0000..0xe000_0000, 0x1_0000_0000..0x2_0000_0000]);
        let bar = Bar::new(&mut space, 0x2_0000, 0x1_0000_0000, window);
        assert_eq!(bar.decoded(&space), None, "not while memory decoding is off");
        space.write(reg::COMMAND, &COMMAND_MEMORY.to_le_bytes());
        assert_eq!(bar.decoded(&space), Some(0x1_0000_0000));

        space.write(reg::BAR0, &[0xff; 8]);
        assert_eq!((space.dword(reg::BAR0), space.dword(reg::BAR0 + 4)), (0xfffe_000c, 0xffff_ffff));
        assert_eq!(bar.decoded(&space), None, "nowhere while it is being sized");
        for (base, decoded) in [
            (0xc000_0000, true),
            (0xdffe_0000, true),
            (0xe000_0000, false),
            (0, false),
            (0x1_fffe_0000, true),
            (0x2_0000_0000, false),
            (0xfee0_0000, false),
        ] {
            space.write(reg::BAR0, &u64::to_le_bytes(base));
            assert_eq!(bar.decoded(&space), decoded.then_some(base), "{base:#x}");
        }
    }
}
