//! `job=info`: what the machine has, as tests want to read it.

use alloc::string::String;

use crate::drivers::queue::{NEXT, WRITE, write_descriptor};
use crate::drivers::{blk, virtio};
use crate::job::Options;
use crate::machine::pvh::StartInfo;
use crate::machine::{acpi, boot, clock, fail, mem, smp};
use crate::say;

/// Prints all of it.
pub fn run(options: &Options, start: &StartInfo, clock_source: &str) {
    say!("info clock source={clock_source} tsc_khz={}", clock::khz());
    cpu();
    for entry in &start.memory {
        say!("info memory start={:#x} size={:#x} kind={}", entry.start, entry.size, entry.kind);
    }
    say!("info heap free={}", mem::left());
    tables();
    for function in crate::drivers::pci::functions() {
        let (vendor, device) = function.ids();
        let class = function.read32(8) >> 8;
        let caps: String = function.capabilities().iter().map(|(id, _)| alloc::format!("{id:#x},")).collect();
        let (slot, number) = (function.device, function.function);
        say!(
            "info pci slot={slot}.{number} vendor={vendor:#06x} device={device:#06x} class={class:#08x} capabilities={}",
            caps.trim_end_matches(',')
        );
    }
    for (index, (kind, function)) in virtio::devices().into_iter().enumerate() {
        device(index, virtio::Transport::new(kind, function), options);
    }
    if options.cpus > 1 {
        smp::start(options.cpus);
        say!("info smp running={}", smp::running());
    }
}

fn cpu() {
    let leaf = |number| boot::cpuid(number).unwrap_or_default();
    let text = |words: [u32; 3]| -> String {
        words.iter().flat_map(|word| word.to_le_bytes()).filter(u8::is_ascii_graphic).map(char::from).collect()
    };
    let (basic, hypervisor) = (leaf(0), leaf(0x4000_0000));
    say!(
        "info cpuid vendor={} highest={:#x} features_ecx={:#x} features_edx={:#x}",
        text([basic[1], basic[3], basic[2]]),
        basic[0],
        leaf(1)[2],
        leaf(1)[3]
    );
    if leaf(1)[2] >> 31 != 0 {
        say!(
            "info hypervisor vendor={} highest={:#x} features={:#x}",
            text([hypervisor[1], hypervisor[2], hypervisor[3]]),
            hypervisor[0],
            leaf(0x4000_0001)[0]
        );
    }
}

fn tables() {
    match acpi::rsdp() {
        Some(at) => {
            let names: String = acpi::signatures().iter().map(|name| String::from_utf8_lossy(name) + ",").collect();
            say!("info acpi rsdp={at:#x} tables={}", names.trim_end_matches(','));
            let fadt = acpi::fadt();
            say!(
                "info acpi sleep_control={} pm1a_control={} reset={} reset_value={:#x}",
                register(fadt.sleep_control),
                register(fadt.pm1a_control.map(acpi::Address::Port)),
                register(fadt.reset.map(|(register, _)| register)),
                fadt.reset.map_or(0, |(_, value)| value)
            );
        }
        None => say!("info acpi rsdp=none"),
    }
    if let Some(ids) = acpi::processors() {
        say!("info madt cpus={} apic_ids={ids:?}", ids.len());
    }
}

fn register(address: Option<acpi::Address>) -> String {
    match address {
        None => String::from("none"),
        Some(acpi::Address::Port(port)) => alloc::format!("io:{port:#x}"),
        Some(acpi::Address::Memory(region)) => alloc::format!("memory:{:#x}", region.base()),
    }
}

/// The answer to GET_ID. The device is started for it, and left to be reset.
fn serial(transport: &virtio::Transport, options: &Options) -> String {
    let mut queue = transport.enable_queue(0, options.queue_size, None, false);
    transport.start();
    let memory = mem::dma(64, 64);
    memory.copy_in(0, &blk::header(blk::T_GET_ID, 0));
    memory.write::<u8>(40, blk::S_UNSET);
    let table = queue.layout.desc;
    write_descriptor(table, 0, memory.base(), blk::HEADER as u32, NEXT, 1);
    write_descriptor(table, 1, memory.base() + blk::HEADER, blk::ID as u32, NEXT | WRITE, 2);
    write_descriptor(table, 2, memory.base() + 40, 1, WRITE, 0);
    queue.offer(0);
    queue.publish();
    let start = clock::ticks();
    while queue.next_used().is_none() {
        if clock::ticks().wrapping_sub(start) > clock::from_ms(options.stall_ms) {
            fail(format_args!("stall where=get-id expected=completion got=none"));
        }
    }
    match memory.read::<u8>(40) {
        blk::S_OK => {}
        status => return alloc::format!("status:{status}"),
    }
    let mut id = [0; blk::ID];
    memory.copy_out(blk::HEADER, &mut id);
    let text: String = id.iter().take_while(|&&byte| byte != 0).map(|&byte| char::from(byte)).collect();
    text.replace(' ', "_")
}

fn device(index: usize, transport: virtio::Transport, options: &Options) {
    // A driver must have shown itself before it asks: some devices do not answer earlier.
    transport.reset();
    transport.add_status(virtio::ACKNOWLEDGE);
    transport.add_status(virtio::DRIVER);
    let features = transport.offered();
    say!(
        "info virtio index={index} type={} slot={} features={features:#x} queues={} msix={} config_bytes={}",
        transport.kind,
        transport.function.device,
        transport.queues(),
        transport.msix.map_or(0, |msix| msix.entries()),
        transport.config.len()
    );
    let sizes: String =
        (0..transport.queues().min(64)).map(|queue| alloc::format!("{},", transport.queue_size(queue))).collect();
    say!("info virtio index={index} queue_sizes={}", sizes.trim_end_matches(','));
    if transport.kind == virtio::BLOCK {
        let accepted = transport.negotiate(options.wanted_features());
        let config = blk::Config::read(&transport, accepted);
        say!(
            "info blk index={index} accepted={accepted:#x} capacity={} size_max={} seg_max={} blk_size={} num_queues={} \
             writeback={} serial={}",
            config.capacity,
            config.size_max,
            config.seg_max,
            config.blk_size,
            config.num_queues,
            u8::from(config.writeback),
            serial(&transport, options)
        );
        say!(
            "info blk index={index} discard_sectors={} discard_seg={} discard_alignment={} write_zeroes_sectors={} \
             write_zeroes_seg={} write_zeroes_may_unmap={}",
            config.max_discard_sectors,
            config.max_discard_seg,
            config.discard_sector_alignment,
            config.max_write_zeroes_sectors,
            config.max_write_zeroes_seg,
            u8::from(config.write_zeroes_may_unmap)
        );
        if config.capacity == 0 {
            fail(format_args!("capacity where=disk:{index} expected=more-than-0 got=0"));
        }
        transport.reset();
    }
}
