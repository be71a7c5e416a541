//! The MC146818 clock in CMOS: the host's time in UTC, to be read. Alarms and interrupts are not there.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;

const INDEX: u64 = 0;
const DATA: u64 = 1;
/// Bit 7 of the index port masks NMIs and selects nothing.
const INDEX_MASK: u8 = 0x7f;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// A 32.768 kHz time base, no update in progress.
const STATUS_A_VALUE: u8 = 0x26;
/// 24 hours, BCD: the format that every driver can read.
const STATUS_B_VALUE: u8 = 0x02;
/// The battery is good.
const STATUS_D_VALUE: u8 = 0x80;

/// The clock.
pub struct Rtc {
    index: u8,
    now: fn() -> u64,
}

impl Default for Rtc {
    fn default() -> Self {
        Self { index: 0, now: unix_time }
    }
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

impl Rtc {
    fn register(&self) -> u8 {
        let now = (self.now)();
        let (days, seconds) = (now / 86400, now % 86400);
        let (year, month, day) = civil(days);
        match self.index {
            SECONDS => bcd(seconds % 60),
            MINUTES => bcd(seconds / 60 % 60),
            HOURS => bcd(seconds / 3600),
            // Day 0 was a Thursday, Sunday is 1.
            WEEKDAY => bcd((days + 4) % 7 + 1),
            DAY => bcd(day),
            MONTH => bcd(month),
            YEAR => bcd(year % 100),
            CENTURY => bcd(year / 100),
            STATUS_A => STATUS_A_VALUE,
            STATUS_B => STATUS_B_VALUE,
            STATUS_D => STATUS_D_VALUE,
            _ => 0,
        }
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], DATA) = (data, offset) {
            *byte = self.register();
        }
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        if let (&[byte], INDEX) = (data, offset) {
            self.index = byte & INDEX_MASK;
        }
    }
}

fn bcd(value: u64) -> u8 {
    (((value / 10 % 10) << 4) | (value % 10)) as u8
}

/// Year, month and day of a day since 1970-01-01 in the Gregorian calendar, by years that begin in March.
fn civil(days: u64) -> (u64, u64, u64) {
    // 719468 days lie between 0000-03-01 and 1970-01-01; 146097 are four centuries.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(now: fn() -> u64, index: u8) -> u8 {
        let mut rtc = Rtc { index: 0, now };
        rtc.write(0x70, 0, &[index | 0x80]);
        let mut data = [0];
        rtc.read(0x70, 1, &mut data);
        data[0]
    }

    #[test]
    fn the_time_is_right_in_bcd() {
        // 2024-02-29 23:59:58 UTC, a Thursday.
        let now = || 1_709_251_198;
        let registers = [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS];
        assert_eq!(registers.map(|index| read(now, index)), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
        assert_eq!([YEAR, MONTH, DAY].map(|index| read(|| 0, index)), [0x70, 0x01, 0x01]);
        assert_eq!([YEAR, MONTH, DAY].map(|index| read(|| 4_102_444_799, index)), [0x99, 0x12, 0x31]);
        assert_eq!(read(now, STATUS_A) & 0x80, 0, "never in the middle of an update");
    }
}
