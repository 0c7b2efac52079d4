"use strict";
const loaded = engine.start();
views.generate = generateView();
views.inside = insideView();
views.provenance = provenanceView();
startPage(loaded);
