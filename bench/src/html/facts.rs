//! What a reader needs to judge a report, and to repeat it: who took part and what starting took, the machine, the commands.

use std::fmt::Write;

use super::text::{escape, shell};
use crate::document::{Document, Job};

/// The end of a page.
pub(super) fn render(document: &Document) -> String {
    programs(document) + &machine(document) + &commands(document)
}

fn programs(document: &Document) -> String {
    let mut page =
        "<section>\n<h2>Who took part</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th class=\"left\"></th>\
        <th>to the guest's first<br>instruction, ms</th><th>least–most</th><th>memory besides<br>the guest's, MiB</th>\
        <th class=\"left\">version and program</th></tr></thead>\n<tbody>\n"
            .to_owned();
    for program in &document.programs {
        let name = &program.name;
        let start = document.spread_of(name, |run| run.to_first_instruction_ns.map(|ns| ns as f64 / 1e6));
        let memory =
            document.spread_of(name, |run| run.memory_beyond_ram.map(|bytes| bytes as f64 / f64::from(1 << 20)));
        let _ = writeln!(
            page,
            "<tr><td class=\"left\">{}</td><td>{}</td><td class=\"soft\">{}</td><td>{}</td><td class=\"left wide\">{}<small>{}</small></td></tr>",
            escape(name),
            start.map_or_else(String::new, |start| format!("{:.1}", start.median)),
            start.map_or_else(String::new, |start| format!("{:.1}–{:.1}", start.least, start.most)),
            memory.map_or_else(String::new, |memory| format!("{:.1}", memory.median)),
            escape(program.version.as_deref().unwrap_or("not told")),
            escape(&program.path),
        );
    }
    page + "</tbody>\n</table></div>\n<p class=\"note\">Medians of all runs. A daemon that must be there before the VMM starts is not part \
            of its start, but its memory counts.</p>\n</section>\n"
}

fn machine(document: &Document) -> String {
    let machine = &document.machine;
    let mut rows: Vec<(&str, String)> = vec![
        ("CPU", format!("{} × {}", machine.cpus, machine.cpu)),
        ("memory", format!("{:.1} GiB", machine.memory as f64 / f64::from(1 << 30))),
        ("kernel", format!("Linux {}", machine.kernel)),
        ("system", machine.system.clone().unwrap_or_else(|| "not told".to_owned())),
        (
            "this machine is",
            if machine.virtual_machine { "a virtual machine itself" } else { "no virtual machine" }.to_owned(),
        ),
        ("modules of KVM", if machine.kvm.is_empty() { "none loaded".to_owned() } else { machine.kvm.join(", ") }),
        ("CPU frequencies", machine.governor.clone().unwrap_or_else(|| "not to be seen from here".to_owned())),
        ("transparent hugepages", machine.hugepages.clone().unwrap_or_else(|| "none".to_owned())),
    ];
    if let Job::Block(job) = &document.job {
        let disk = job.disk.as_deref().unwrap_or("null storage: nothing holds its bytes");
        rows.push(("disk", format!("{disk}, {} MiB used", job.disk_bytes >> 20)));
        rows.push(("file system", job.disk_file_system.clone().unwrap_or_else(|| "none".to_owned())));
    }
    if let Job::Linux(job) = &document.job {
        rows.push(("the guest's kernel", format!("Linux {}", job.kernel)));
        if let Some(disk) = &job.disk {
            rows.push(("disk", format!("{disk}, {} MiB", job.disk_bytes >> 20)));
            rows.push(("file system", job.disk_file_system.clone().unwrap_or_else(|| "none".to_owned())));
        }
    }
    let mut page = "<section>\n<h2>Where</h2>\n<div class=\"scroll\"><table class=\"facts\">\n<tbody>\n".to_owned();
    for (what, is) in rows {
        let _ =
            writeln!(page, "<tr><td class=\"left soft\">{what}</td><td class=\"left wide\">{}</td></tr>", escape(&is));
    }
    page += "</tbody>\n</table></div>\n<details><summary>Mitigations of the CPU's weaknesses</summary>\n<div class=\"scroll\"><table class=\"facts\">\n<tbody>\n";
    for (name, text) in &machine.mitigations {
        let _ = writeln!(
            page,
            "<tr><td class=\"left soft\">{}</td><td class=\"left wide\">{}</td></tr>",
            escape(name),
            escape(text)
        );
    }
    page + "</tbody>\n</table></div>\n</details>\n</section>\n"
}

fn commands(document: &Document) -> String {
    let mut page = format!(
        "<section>\n<h2>Repeat it</h2>\n<p class=\"sub\">{}</p>\n<pre>{}</pre>\n<details><summary>The command line of each VMM</summary>\n",
        escape(&document.tool),
        escape(&shell(&document.command))
    );
    let mut shown: Vec<&str> = Vec::new();
    for series in document.series.iter().filter(|series| !series.command.is_empty()) {
        // They differ from point to point in the guest's own options only.
        if shown.contains(&series.name.as_str()) {
            continue;
        }
        shown.push(&series.name);
        let _ = writeln!(page, "<h3>{}</h3>", escape(&series.name));
        for command in [&series.daemon, &series.command].into_iter().filter(|command| !command.is_empty()) {
            let _ = writeln!(page, "<pre>{}</pre>", escape(&shell(command)));
        }
    }
    page += "</details>\n";
    if let Job::Linux(job) = &document.job
        && !job.fio.is_empty()
    {
        page += "<details><summary>fio's job files, as the guest had them</summary>\n";
        for text in &job.fio {
            let _ = writeln!(page, "<pre>{}</pre>", escape(text));
        }
        page += "</details>\n";
    }
    page + "</section>\n"
}
